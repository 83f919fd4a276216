"""The page as one HTML file, which contains its style and its scripts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from plphp.errors import InputError, how_to_install
from plphp.inspector.data import Page
from plphp.inspector.gather import page_of_report
from plphp.inspector.pictures import Media
from plphp.report import Report

FRAME = (
    '<iframe srcdoc="{{ page }}" title="plphp report" '
    'style="width:100%;height:780px;border:0"></iframe>'
)


def render(page: Page) -> str:
    """The text of the HTML file. Raises InputError if jinja2 is not installed.

    The template escapes prompts and names. In the data, `tojson` escapes every "<", so that no text
    can end the script element.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise InputError(f"the page needs jinja2: {how_to_install('inspector')}") from None
    assets = files("plphp.inspector") / "assets"
    parts = {
        name: (assets / file).read_text(encoding="utf-8")
        for name, file in (
            ("css", "page.css"),
            ("charts", "charts.js"),
            ("pictures", "pictures.js"),
            ("script", "page.js"),
        )
    }
    template = (assets / "page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(template).render(page=page.to_json(), **parts)


def write_html(page: Page, path: str | os.PathLike[str]) -> None:
    """Write the page to a file. Raises InputError if the file cannot be written."""
    text = render(page)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def write_report(
    report: Report,
    path: str | os.PathLike[str],
    images: Sequence[Media],
    *,
    prompt: str,
    answer: str,
    processor: Any,
    row: int,
) -> None:
    """Write the page of one row of a report to a file; see `Report.to_html`."""
    write_html(page_of_report(report, images, prompt, answer, processor, row), path)


def notebook(report: Report) -> str | None:
    """The page of a report's first row as an iframe; None if it cannot be drawn."""
    try:
        return frame(page_of_report(report))
    except InputError:
        return None


def frame(page: Page) -> str:
    """The page as an iframe, for a notebook. Raises InputError if jinja2 is not installed."""
    return FRAME.replace("{{ page }}", escape(render(page)))
