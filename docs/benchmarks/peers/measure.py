"""plphp, OpenVINO GenAI and llama.cpp on one CPU: the same shape, weights and prompt, in turn.

    make bench-cpu-peers [COLUMNS=4096] [THREADS=2]

Each program has its own environment and process. All have 4-bit weights of one decoder with random
weights, read the same prompt, and decode; every way has one round in each turn. Prints a table, and
writes the numbers to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
SHORT = 128  # columns of the prompt of the warm-up


@dataclass(frozen=True)
class Program:
    """A process that serves rounds of some ways.

    name: in the table; script: file of this directory; ways: as its arguments name them
    """

    name: str
    script: str
    ways: tuple[str, ...]
    python: str
    more: tuple[str, ...] = ()


def programs(given: argparse.Namespace) -> list[Program]:
    columns, threads = str(given.columns), str(given.threads)
    own = ("stock", "pruned", "pruned, 4 bits")
    openvino, llama = given.openvino, given.llamacpp
    return [
        Program("plphp, int4", "own.py", own, sys.executable, ("int4",)),
        Program("plphp, float32", "own.py", own[1:2], sys.executable, ("float32",)),
        *(
            Program("OpenVINO", "openvino_rounds.py", (way,), openvino, (way, columns, threads))
            for way in ("plain", "eviction", "short")
        ),
        *(
            Program("llama.cpp", "llamacpp_rounds.py", (way,), llama, (way, columns, threads))
            for way in ("16 bits", "8 bits")
        ),
    ]


def start(program: Program, folder: Path, threads: int) -> Any:
    """The process of a program, which has loaded its model."""
    command = [program.python, str(HERE / program.script), str(folder), *program.more]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)
    _answer(process)
    return process


def _answer(process: Any) -> dict[str, Any]:
    """The next line of JSON; programs print other lines too."""
    for line in process.stdout:
        if line.startswith("{"):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit(f"{process.args[1]} ended with {process.wait()}")


def measure(given: argparse.Namespace) -> list[dict[str, Any]]:
    every = programs(given)
    running = [start(program, given.folder, given.threads) for program in every]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for turn in range(given.rounds + 1):  # the first turn, of short prompts, is a warm-up
        for program, process in zip(every, running, strict=True):
            for way in program.ways:
                columns = given.columns if turn else SHORT
                asked = {"way": way, "columns": columns, "new": given.new}
                print(json.dumps(asked), file=process.stdin, flush=True)
                answer = _answer(process)
                print(f"{turn} {program.name}, {way}: {answer}", file=sys.stderr)
                if turn:
                    found.setdefault((program.name, way), []).append(answer)
    for process in running:
        process.stdin.close()
        process.wait()
    return [_row(name, way, rounds) for (name, way), rounds in found.items()]


def _row(name: str, way: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    keys = ("first_ms", "step_ms", "cpu_first_ms", "cpu_step_ms", "peak")
    rows: dict[str, Any] = {key: median(one[key] for one in rounds) for key in keys}
    return {"program": name, "way": way, **rows, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--openvino", required=True, help="Python of its environment")
    parser.add_argument("--llamacpp", required=True, help="Python of its environment")
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = measure(given)
    heads = ("ms a token", "CPU ms", "first, ms", "CPU ms", "peak MiB")
    print(" " * 32 + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        label = f"{row['program']}, {row['way']}"
        times = [row[key] for key in ("step_ms", "cpu_step_ms", "first_ms", "cpu_first_ms")]
        print(
            f"{label:<32}" + "".join(f"{t:>12.1f}" for t in times) + f"{row['peak'] / 2**20:>12.0f}"
        )
    if given.out:
        setting = {k: v for k, v in vars(given).items() if isinstance(v, int)}
        given.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
