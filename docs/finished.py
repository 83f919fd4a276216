"""The results of a finished `plphp eval`, with the machine and the date, for pages made of them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plphp.bench.machine import describe


def results(run: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The run's summary.json, and {"machine", "date"}: this machine, and the day the run ended."""
    ended = max(path.stat().st_mtime for path in (run / "samples").iterdir())
    date = datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d")
    summary = json.loads((run / "summary.json").read_text())
    return summary, {"machine": describe("cpu")["machine"], "date": date}
