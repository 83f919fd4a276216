"""WHERE kept tokens live: buffers of one layer, byte accounting, the report."""

from plphp.cache.memory import allocated
from plphp.cache.report import LayerReport, Report, Seen, layer_report, untouched_report
from plphp.cache.static import StaticStore, bucketed
from plphp.cache.store import KVStore, slack, take
from plphp.cache.traffic import RecallReport

__all__ = [
    "KVStore",
    "LayerReport",
    "RecallReport",
    "Report",
    "Seen",
    "StaticStore",
    "allocated",
    "bucketed",
    "layer_report",
    "slack",
    "take",
    "untouched_report",
]
