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
    path = file_of(name)
    if rounds:
        results = {"rounds": [*results_of(name).get("rounds", []), results]}
        results["median [least, most]"] = summary(results["rounds"])
    result = {
        "what": (what or "").strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {vectors()}, {os.cpu_count()} cores",
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "plphp": plphp.__version__,
        },
        "results": results,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


def file_of(name: str) -> Path:
    """The file of today's result."""
    return Path(__file__).parent / f"{date.today().isoformat()}-{name}.json"


def results_of(name: str) -> dict[str, Any]:
    """The results in today's file, empty if there is none."""
    path = file_of(name)
    return dict(json.loads(path.read_text())["results"]) if path.exists() else {}


def vectors() -> str:
    """The vector instructions that torch uses, such as AVX2."""
    return str(torch.backends.cpu.get_cpu_capability())


def summary(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, str]]:
    """Of every number of every case, over the rounds."""
    return {
        case: {name: across([one[case][name] for one in rounds]) for name in rounds[0][case]}
        for case in rounds[0]
    }


def across(values: list[float]) -> str:
    return f"{statistics.median(values):g} [{min(values):g}, {max(values):g}]"
