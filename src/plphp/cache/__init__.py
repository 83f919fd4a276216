"""WHERE kept tokens live: buffers of one layer, byte accounting, the report."""

from plphp.cache.earlier import EarlierImage, images_left, images_of, in_rows, told
from plphp.cache.memory import allocated
from plphp.cache.report import LayerReport, Report, Seen, layer_report, untouched_report
from plphp.cache.static import StaticStore, bucketed
from plphp.cache.store import KVStore, slack, take
from plphp.cache.traffic import RecallReport

__all__ = [
    "EarlierImage",
    "KVStore",
    "LayerReport",
    "RecallReport",
    "Report",
    "Seen",
    "StaticStore",
    "allocated",
    "bucketed",
    "images_left",
    "images_of",
    "in_rows",
    "layer_report",
    "slack",
    "take",
    "told",
    "untouched_report",
]
