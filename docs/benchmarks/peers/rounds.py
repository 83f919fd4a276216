"""What each program's process shares: rounds on request, and their numbers as lines of JSON.

It imports nothing but the standard library, because it runs in three environments.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median

LETTERS = 256  # token ids below it are bytes
Moment = tuple[float, float]  # seconds of the clock, and CPU-seconds of all threads of the process
# ways: name -> a function from (prompt, new tokens) to the moments at which each token came
Ways = Mapping[str, Callable[[list[int], int], list[Moment]]]


def now() -> Moment:
    return time.perf_counter(), time.process_time()


def prompt(columns: int) -> list[int]:
    """Token ids of a prompt, the same in every process."""
    return random.Random(columns).choices(range(LETTERS), k=columns)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def serve(ways: Ways) -> None:
    """For each line {"way", "columns", "new"} on stdin run one round, and print its numbers."""
    print(json.dumps({"ways": list(ways)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        ids, begin = prompt(asked["columns"]), now()
        times = [begin, *ways[asked["way"]](ids, asked["new"])]
        found: dict[str, float] = {"peak": peak_bytes()}
        for kind, part in (("", 0), ("cpu_", 1)):
            spent = [1e3 * (after[part] - before[part]) for before, after in pairwise(times)]
            found |= {f"{kind}first_ms": spent[0], f"{kind}step_ms": median(spent[2:])}
        print(json.dumps(found), flush=True)
