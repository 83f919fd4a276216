"""The soak in a process of its own: `soak_run.py COUNT [STANDIN...]`, as `make soak-vllm` calls it.

Serves COUNT requests with shared prefixes and COUNT that are pruned in place, and writes what is
left of them beside docs/benchmarks/vllm/measure.py. STANDIN: what the process has from a GPU, such
as `v2 async`; see `standins`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import standins

BESIDE = Path(__file__).parents[2] / "docs" / "benchmarks" / "vllm"
WHAT = "{count:,} short requests each way, aborted and preempted at random: what is left of them."


def main(count: str, *names: str) -> None:
    os.environ.update(standins.environment(names))
    os.environ.update(
        HF_HUB_OFFLINE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_NO_USAGE_STATS="1",
    )
    for name in names:
        standins.install(name)
    sys.path.append(str(BESIDE))
    from record import record
    from soak import soak

    ways = {"shared prefix": True, "in place": False}
    results = {}
    for way, share in ways.items():
        results[way] = soak(int(count), share)
        record("-".join(["soak", *names]), WHAT.format(count=int(count)), results)


if __name__ == "__main__":
    main(*sys.argv[1:])
