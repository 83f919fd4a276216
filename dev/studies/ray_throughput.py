"""Measures how much faster two Ray workers answer a batch than one, each with one thread.

    python dev/studies/ray_throughput.py --lines 600        # in the environment of make test-ray

The command ``plphp generate --batch --ray`` runs for 1, 2, 1 and 2 workers in turn. Each run is
timed whole and from its first to its last answer: the start of Ray and of the workers, a matter of
seconds, is the same for any number of lines. Prints one JSON object; rates are lines a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from plphp.demo.model import WEIGHTS

PROMPTS = ("What is the color of the star?", "Describe the picture.", "What is shown?")


def write_lines(path: Path, count: int) -> None:
    """A batch of `count` questions about the pictures of the demo."""
    pictures = sorted((WEIGHTS.parent / "pictures").glob("*.png"))
    with path.open("w") as file:
        for i in range(count):
            picture = str(pictures[i % len(pictures)])
            line = {"id": i, "images": [picture], "prompt": PROMPTS[i % len(PROMPTS)]}
            file.write(json.dumps(line) + "\n")


def run(batch: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """Seconds of the whole command, seconds from first to last answer, answers in between."""
    command = f"-m plphp generate --batch {batch} --out {out} --max-new-tokens 32 --json --ray"
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *command.split(), "--workers", str(workers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    ) as process:
        part, first = out.with_name(out.name + ".part"), 0.0
        early = late = 0
        last = began
        while process.poll() is None:
            time.sleep(0.2)
            count = _count(part)
            if count > late:
                last, late = time.monotonic(), count
                if not first:
                    first, early = last, count
    if process.returncode:
        raise SystemExit(f"{workers} workers: exit code {process.returncode}")
    return time.monotonic() - began, last - first, late - early


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=600)
    lines = parser.parse_args().lines
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        batch = Path(folder) / "in.jsonl"
        write_lines(batch, lines)
        for turn, workers in enumerate((1, 2, 1, 2)):
            whole, between, answers = run(batch, Path(folder) / f"{turn}.jsonl", workers)
            runs.append(
                {
                    "workers": workers,
                    "seconds": round(whole, 1),
                    "rate": round(lines / whole, 2),
                    "steady_rate": round(answers / between, 2),
                }
            )
            print(json.dumps(runs[-1]), file=sys.stderr)
    ratios = [round(runs[i + 1]["steady_rate"] / runs[i]["steady_rate"], 2) for i in (0, 2)]
    whole = [round(runs[i + 1]["rate"] / runs[i]["rate"], 2) for i in (0, 2)]
    print(json.dumps({"lines": lines, "runs": runs, "steady": ratios, "whole": whole}))


if __name__ == "__main__":
    main()
