"""Take results of a GPU into the repository: python dev/gpu/take.py DIR, or make gpu-import DIR=DIR

DIR holds the files of run.py. Benchmarks go to docs/benchmarks/gpu, and the checks, recall and the
measurements of the kernels to docs/benchmarks/gpu-others, one JSON file each. The constants in
src/plphp/attention/tuned.py are chosen anew from those measurements. The results of a dry run, and
those without a GPU, are refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from pieces import ROOT, runs

from plphp.attention.launch import split_count
from plphp.attention.tuned import Costs

OTHERS = ("recall-32k-x8", "tune", "vllm")
Line = Mapping[str, Any]
GRID = [Costs(*each) for each in itertools.product(range(1, 5), range(9), range(0, 17, 2))]
TUNED = '''\
"""Constants of the attention kernels that depend on the GPU. `make gpu-import` writes this file.

Measured on {machine}, torch {torch}, {date} (docs/benchmarks/gpu-others/tune.json).
"""

from __future__ import annotations

from typing import NamedTuple


class Costs(NamedTuple):
    """What `launch.split_count` assumes, in units of the time in which a program reads one block.

    resident: programs that a multiprocessor runs at a time
    start: cost of starting a program
    second: cost of the second kernel, which adds up the splits
    """

    resident: int
    start: int
    second: int


COSTS = {costs}

# The number of slots from which a decode step uses the Triton kernel, None for never: "masked" if
# SDPA would need a mask, or for soft-capping, which it does not support; "plain" otherwise.
KERNEL_FROM: dict[str, int | None] = {kernel_from}
'''


def lines(folder: Path) -> dict[str, Line]:
    """The last good line of every piece, or its last one. Raises SystemExit for a dry run's."""
    found: dict[str, Line] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["dry"]:
                sys.exit(f"{path} is of a dry run, whose figures mean nothing")
            if line["state"] == "ok" or found.get(line["piece"], {}).get("state") != "ok":
                found[line["piece"]] = line
    if not found:
        sys.exit(f"{folder} has no results: it must hold check.jsonl, bench.jsonl or vllm.jsonl")
    return found


def take(folder: Path, root: Path) -> list[Path]:
    """Write the files of a folder of results below a root, and return them."""
    found, written = lines(folder), []
    docs = root / "docs" / "benchmarks"
    for name, line in found.items():
        if line["state"] != "ok" or line["result"] is None:
            continue
        if name in runs():
            if line["result"]["setting"]["device"] != "cuda":
                sys.exit(f"{name} was not measured on a GPU")
            written.append(_write(docs / "gpu" / f"{name}.json", line["result"]))
        elif name in OTHERS:
            written.append(_write(docs / "gpu-others" / f"{name}.json", line["result"]))
    tests = {name: line for name, line in found.items() if _is_test(line)}
    if tests:
        about = found["machine"]["result"] if "machine" in found else None
        checked = {name: {"state": x["state"], **x["result"]} for name, x in tests.items()}
        written.append(
            _write(docs / "gpu-others" / "check.json", {"machine": about, "tests": checked})
        )
    if found.get("tune", {}).get("state") == "ok":
        path = root / "src" / "plphp" / "attention" / "tuned.py"
        path.write_text(tuned(found["tune"]["result"]))
        written.append(path)
    return written


def _is_test(line: Line) -> bool:
    return isinstance(line["result"], dict) and "passed" in line["result"]


def _write(path: Path, found: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def tuned(found: Line) -> str:
    """The text of tuned.py for the measurements of tune.py."""
    return TUNED.format(
        **{name: found["about"][name] for name in ("machine", "torch", "date")},
        costs=repr(fitted(found["splits"], found["multiprocessors"])),
        kernel_from=json.dumps(
            {kind: kernel_from(found["kernels"], kind) for kind in ("plain", "masked")}
        ).replace("null", "None"),
    )


def kernel_from(rows: Iterable[Line], kind: str) -> int | None:
    """The slots from which the Triton kernel is at least as fast as PyTorch's, at all lengths.

    At each length the median of the ratios over batches and heads counts.
    """
    ratios: dict[int, list[float]] = {}
    for row in rows:
        if row["kind"] == kind:
            ratios.setdefault(row["slots"], []).append(row["triton"] / row["sdpa"])
    least: int | None = None
    for slots in sorted(ratios, reverse=True):
        if median(ratios[slots]) > 1:
            return least
        least = slots
    return 0 if ratios else None


def fitted(found: Sequence[Line], multiprocessors: int) -> Costs:
    """The costs whose choice of splits loses least time, as a product of ratios to the best."""

    def lost(costs: Costs) -> float:
        total = 0.0
        for case in found:
            seconds = {int(count): value for count, value in case["seconds"].items()}
            wanted = split_count(case["programs"], case["blocks"], multiprocessors, costs)
            nearest = min(seconds, key=lambda count: abs(math.log(count / wanted)))
            total += math.log(seconds[nearest] / min(seconds.values()))
        return total

    return min(GRID, key=lost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--root", type=Path, default=ROOT, help="of the repository")
    asked = parser.parse_args()
    for path in take(asked.folder, asked.root):
        print(path)


if __name__ == "__main__":
    main()
