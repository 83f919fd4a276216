"""The inspector: what was kept, where, and what it cost, as one page or a few figures."""

from plphp.report.data import Answer, Layer, Page, Picture, Run, Steps
from plphp.report.examine import examine
from plphp.report.gather import page_of, page_of_report, run_of
from plphp.report.html import notebook, render, write_html
from plphp.report.plot import plot
from plphp.report.videos import shown_videos

__all__ = [
    "Answer",
    "Layer",
    "Page",
    "Picture",
    "Run",
    "Steps",
    "examine",
    "notebook",
    "page_of",
    "page_of_report",
    "plot",
    "render",
    "run_of",
    "shown_videos",
    "write_html",
]
