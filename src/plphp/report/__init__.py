"""The inspector: what was kept, where, and what it cost, as one page or a few figures."""

from plphp.report.data import Answer, Layer, Page, Picture, Run, Steps
from plphp.report.examine import examine
from plphp.report.gather import page_of, page_of_report, run_of

__all__ = [
    "Answer",
    "Layer",
    "Page",
    "Picture",
    "Run",
    "Steps",
    "examine",
    "page_of",
    "page_of_report",
    "run_of",
]
