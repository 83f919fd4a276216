"""A plugin of pytest that writes the outcome of every test at once, so that a kill loses none."""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """Append a line to the file TALLY: the test, its outcome, its seconds, and why it failed.

    With pytest-xdist only the process that collects the reports writes.
    """
    if "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    said = str(report.longrepr)[-800:] if report.failed else ""
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "said": said,
    }
    with open(os.environ["TALLY"], "a") as file:
        file.write(json.dumps(line) + "\n")
