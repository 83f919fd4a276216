"""Reports: what a prefill kept and the bytes it takes, as data. `plphp.inspector` draws them."""

from typing import TYPE_CHECKING

from plphp._renamed import old_names
from plphp.report.earlier_images import (
    EarlierImage,
    earlier_images_note,
    images_left,
    images_of,
    in_rows,
)
from plphp.report.layers import (
    LayerReport,
    Seen,
    StageReport,
    layer_report,
    left_aligned,
    one_class_note,
    ratio,
    refuse_undefined,
    undefined_note,
    untouched_report,
)
from plphp.report.report import Drawing, Report
from plphp.report.traffic import RECENT, CodesReport, RecallReport

if not TYPE_CHECKING:  # a type checker is to see the new names only
    __getattr__ = old_names(__name__)

__all__ = [
    "RECENT",
    "CodesReport",
    "Drawing",
    "EarlierImage",
    "LayerReport",
    "RecallReport",
    "Report",
    "Seen",
    "StageReport",
    "earlier_images_note",
    "images_left",
    "images_of",
    "in_rows",
    "layer_report",
    "left_aligned",
    "one_class_note",
    "ratio",
    "refuse_undefined",
    "undefined_note",
    "untouched_report",
]
