"""Measurements: side by side, in one run, medians."""

from plphp.bench.compare import Comparison, Run, compare

__all__ = ["Comparison", "Run", "compare"]
