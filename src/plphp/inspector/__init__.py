"""The inspector: what was kept, where, and what it cost, as one page or a few figures."""

from plphp.inspector.data import Answer, Layer, Page, Picture, Run, Steps
from plphp.inspector.examine import examine
from plphp.inspector.gather import page_of, page_of_report, run_of
from plphp.inspector.html import notebook, render, write_html, write_report
from plphp.inspector.plot import plot
from plphp.inspector.videos import shown_videos

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
    "write_report",
]
