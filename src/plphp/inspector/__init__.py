"""The inspector: an HTML page or a figure that shows what pruning kept and what it cost."""

from plphp.inspector.data import Answer, Layer, Page, Picture, PolicyResult, Steps
from plphp.inspector.examine import examine
from plphp.inspector.gather import page_of, page_of_report, result_of
from plphp.inspector.html import notebook, render, write_html, write_report
from plphp.inspector.inspect import Inspection, inspect
from plphp.inspector.plot import plot
from plphp.inspector.videos import shown_videos

__all__ = [
    "Answer",
    "Inspection",
    "Layer",
    "Page",
    "Picture",
    "PolicyResult",
    "Steps",
    "examine",
    "inspect",
    "notebook",
    "page_of",
    "page_of_report",
    "plot",
    "render",
    "result_of",
    "shown_videos",
    "write_html",
    "write_report",
]
