"""Where kept tokens are stored: the buffers of one layer, and the bytes that they take."""

from typing import TYPE_CHECKING

from plphp._renamed import old_names
from plphp.cache.memory import allocated
from plphp.cache.static import StaticStore, bucketed
from plphp.cache.store import KVStore, slack, take, without_gaps

if not TYPE_CHECKING:  # a type checker is to see the new names only
    __getattr__ = old_names(__name__)

__all__ = ["KVStore", "StaticStore", "allocated", "bucketed", "slack", "take", "without_gaps"]
