"""The soak in a process of its own: `soak_run.py COUNT [STANDIN...]`, as `make soak-vllm` calls it.

Serves COUNT requests with shared prefixes and COUNT that are pruned in place, and writes what is
left of them beside docs/benchmarks/vllm/measure.py. STANDIN: what the process has from a GPU, such
as `v2 async`; see `standins`.

The result is written after every `soak.PART` requests. A later call on the same day goes on, in an
engine of its own, until COUNT requests have been served each way.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import standins

BESIDE = Path(__file__).parents[2] / "docs" / "benchmarks" / "vllm"
WAYS = {"shared prefix": True, "in place": False}
WHAT = (
    "Short requests that are aborted and preempted at random: what is left of them. {count:,} "
    "requests each way are asked for. Each process that served a part of them is one entry."
)


def main(count: str, *names: str) -> None:
    os.environ.update(standins.environment(names))
    for name in names:
        standins.install(name)
    sys.path.append(str(BESIDE))
    from record import record, results_of

    name, about = "-".join(["soak", *names]), WHAT.format(count=int(count))
    results = results_of(name)
    for way in WAYS:
        serve(int(count), way, results, lambda: record(name, about, results))


def serve(count: int, way: str, results: dict[str, Any], write: Callable[[], None]) -> None:
    """Serve what is missing of `count` requests. results: of all ways, gets an entry"""
    from soak import soak

    parts = results.setdefault(way, [])
    missing = count - sum(part["requests"] for part in parts)
    if missing <= 0:
        return
    entry: dict[str, Any] = {"requests": 0}
    parts.append(entry)

    def tell(found: dict[str, Any]) -> None:
        entry.update(found)
        write()

    try:
        soak(missing, WAYS[way], seed=4 + len(parts), tell=tell)
    except Exception as error:
        tell({"failed": repr(error)})
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
