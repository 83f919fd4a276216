"""Writes the summary of a run into its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plphp.eval.curves import draw
from plphp.eval.store import write_json
from plphp.eval.tables import markdown


def write(summary: dict[str, Any], out: Path) -> None:
    """Write summary.json, summary.md and the figures with curves."""
    write_json(out / "summary.json", summary)
    (out / "summary.md").write_text(markdown(summary), encoding="utf-8", errors="backslashreplace")
    draw(summary, out)
