"""RECALL: what a policy drops is parked, and read again when a later token looks for it."""

from __future__ import annotations

from typing import Any

from plphp.cache import KVStore
from plphp.policy import Look
from plphp.recall.host import HostHome
from plphp.recall.options import HOMES, Recall, as_recall

__all__ = ["HOMES", "HostHome", "Recall", "as_recall", "park"]


def park(store: KVStore, look: Look, recall: Recall) -> Any:
    """The home of one layer's vision tokens, which then says what the store may keep."""
    return HostHome(store, look, recall)
