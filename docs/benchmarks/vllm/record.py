"""A dated result beside this file, with the machine and the versions that made it."""

from __future__ import annotations

import json
import os
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch
import vllm

import plphp


def record(name: str, what: str | None, results: dict[str, Any], rounds: bool = False) -> None:
    """Write `DATE-name.json`. what: a docstring, which says what was measured.

    rounds: keep those that the file has, and write the medians and ranges of all of them
    """
    path = Path(__file__).parent / f"{date.today().isoformat()}-{name}.json"
    if rounds:
        before = json.loads(path.read_text())["results"]["rounds"] if path.exists() else []
        results = {"rounds": [*before, results]}
        results["median [least, most]"] = summary(results["rounds"])
    result = {
        "what": (what or "").strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "plphp": plphp.__version__,
        },
        "results": results,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, str]]:
    """Of every number of every case, over the rounds."""
    return {
        case: {name: across([one[case][name] for one in rounds]) for name in rounds[0][case]}
        for case in rounds[0]
    }


def across(values: list[float]) -> str:
    return f"{statistics.median(values):g} [{min(values):g}, {max(values):g}]"
