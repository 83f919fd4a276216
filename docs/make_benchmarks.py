"""Write docs/benchmarks.md from the committed results: `make bench-page`.

With --run, the runs on a CPU that have no result are made first, one `plphp bench` each. Those on a
GPU are made by dev/gpu. A result is one JSON file with the name of its run, in docs/benchmarks/cpu
or /gpu.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import jinja2

from plphp.bench.capacity import fits
from plphp.bench.present import capacity_table, sections, title
from plphp.bench.run import MEMORIES
from plphp.bench.shapes import SHAPES

DOCS = Path(__file__).parent
FOLDER = DOCS / "benchmarks"
SHORT = "--rounds 5 --new-tokens 8"
SMALL = "--shape qwen2-vl-2b"

CPU = {
    f"{context // 1024}k-{dtype}": f"{SMALL} --context {context} --dtype {dtype} {SHORT}"
    for dtype in ("float32", "bfloat16")
    for context in (2048, 8192, 32768)
    if (dtype, context) != ("float32", 32768)  # below with half of the layers, to save 13 GiB
} | {
    "32k-float32": f"{SMALL} --layers 14 --context 32768 {SHORT}",
    "nine-tenths": f"{SMALL} --context 8192 --dtype bfloat16 --keep .9 {SHORT}",
    "no-gqa": f"--shape llava-1.5-7b --layers 8 --context 8192 --dtype bfloat16 {SHORT}",
    "rows": f"{SMALL} --context 4096 --batch 4 --dtype bfloat16 {SHORT}",
    "ways": f"{SMALL} --layers 8 --context 8192 --dtype bfloat16 {SHORT} "
    "--against short,static,pruned-static,fp8,snapkv,vl-cache",
    "prefill": f"{SMALL} --layers 4 --context 4096 --prefill {SHORT}",
}
ASKED = json.loads((FOLDER / "gpu-runs.json").read_text())
GPU = {name: f"{ASKED['model']} {options}" for name, options in ASKED["runs"].items()}
Shown = Mapping[str, Any]


def run(names: Mapping[str, str], folder: Path) -> None:
    """Run the benchmarks that have no result file yet, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, options in names.items():
        path = folder / f"{name}.json"
        if path.exists():
            continue
        print(f"{name}: plphp bench {options}", file=sys.stderr)
        done = subprocess.run(
            [sys.executable, "-m", "plphp", "bench", *options.split(), "--json"],
            stdout=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            print(f"{name} failed", file=sys.stderr)
            continue
        path.write_text(done.stdout)


def page() -> str:
    """The text of the page, from the committed results."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    cpu, gpu, others = (_read(FOLDER / name) for name in ("cpu", "gpu", "gpu-others"))
    template = environment.get_template("benchmarks.md.jinja")
    return template.render(
        cpu=[(name, options, cpu.get(name)) for name, options in CPU.items()],
        cpu_found={name: cpu.get(name) for name in CPU},
        gpu=[(name, options, gpu.get(name)) for name, options in GPU.items()],
        others=others,
        machines=machines([*gpu.values(), *others.values()]),
        over=over,
        of_bound=of_bound,
        prompt=prompt,
        sections=sections,
        title=title,
        fits=[_capacity("qwen2-vl-2b"), _capacity("qwen2-vl-7b")],
    )


def over(found: Shown | None, mine: str, theirs: str) -> str:
    """The ratio of two variants' steps: the median of the rounds and their range."""
    if found is None:
        return "not measured yet"
    rounds = {row["name"]: row["rounds_ms"] for row in found["steps"]}
    if mine not in rounds or theirs not in rounds:
        return ""
    ratios = [a / b for a, b in zip(rounds[mine], rounds[theirs], strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"


def of_bound(found: Shown, name: str) -> str:
    """The bound as a share of a variant's step; nothing if it was not measured."""
    return "".join(f"{row['of_bound']:.0%}" for row in found["steps"] if row["name"] == name)


def prompt(found: Shown) -> str:
    """The ratio of the pruned to the stock prefill; nothing if it was not measured."""
    rows = {row["name"]: row for row in found["prefill"] or []}
    return "{:.2f} ({:.2f} - {:.2f})".format(*rows["pruned"]["over_stock"]) if rows else ""


def machines(found: Iterable[Shown]) -> list[str]:
    """Where and when results were made, each once."""
    abouts = [one["about"] for one in found if "about" in one]
    said = [
        f"{about['machine']}, Python {about['python']}, torch {about['torch']}, "
        f"transformers {about['transformers']}, {about['date']}"
        for about in abouts
    ]
    return [*dict.fromkeys(said)]


def draw(found: Mapping[str, Shown], path: Path) -> None:
    """Draw the ratio of a pruned step to a stock step for each run, and that of their bytes."""
    import matplotlib

    matplotlib.use("Agg")  # no window system needed
    from matplotlib import pyplot as plt

    names = [name for name in CPU if name in found][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.42 * len(names) + 1.2), layout="constrained")
    for place, name in enumerate(names):
        rows = {row["name"]: row for row in found[name]["steps"]}
        for variant, color, up in (("pruned", "#0072b2", 0.12), ("short", "#999999", -0.12)):
            middle, low, high = rows[variant]["over_stock"]
            label = None if place else variant
            axes.plot([low, high], [place + up] * 2, color=color, linewidth=1)
            axes.plot(middle, place + up, "o", color=color, label=label)
        bytes_only = rows["pruned"]["bound_ms"] / rows["stock"]["bound_ms"]
        axes.plot(bytes_only, place, "|", color="#cc3311", markersize=14, markeredgewidth=2)
    axes.plot([], [], "|", color="#cc3311", label="ratio of the bytes")
    axes.axvline(1, color="#555555", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(0, 1.6)
    axes.set_xlabel("time of a decoding step / that of the stock cache: median and range of rounds")
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _capacity(name: str, context: int = 32768, rate: float = 0.4) -> Shown:
    rows = [fits(SHAPES[name], memory, rate, 2, context, 1) for memory in MEMORIES]
    header, cells = capacity_table(rows, context, 1)
    return {"title": f"{name}, bfloat16, 40 % kept", "header": header, "cells": cells}


def _read(folder: Path) -> dict[str, Shown]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", action="store_true", help="make missing results first")
    chosen = parser.parse_args()
    if chosen.run:
        run(CPU, FOLDER / "cpu")
    (DOCS / "benchmarks.md").write_text(page())
    draw(_read(FOLDER / "cpu"), FOLDER / "cpu.png")


if __name__ == "__main__":
    main()
