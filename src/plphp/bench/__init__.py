"""Measurements of the full and the pruned cache, which take turns in one run."""

from typing import TYPE_CHECKING

from plphp._renamed import old_names
from plphp.bench.compare import Comparison, compare
from plphp.bench.ways import Timing, Way

if not TYPE_CHECKING:  # a type checker is to see the new names only
    __getattr__ = old_names(__name__)

__all__ = ["Comparison", "Timing", "Way", "compare"]
