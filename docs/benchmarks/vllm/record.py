"""A dated result beside this file, with the machine and the versions that made it."""

from __future__ import annotations

import json
import os
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch
import vllm

import plphp


def record(name: str, what: str | None, results: dict[str, Any]) -> None:
    """Write `DATE-name.json`. what: a docstring whose first line says what was measured."""
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
    path = Path(__file__).parent / f"{date.today().isoformat()}-{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
