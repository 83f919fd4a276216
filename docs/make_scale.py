"""Write docs/scale.json and the table of docs/scale.md: images a second, dollars a million.

    python docs/make_scale.py

A model of one replica, with its assumptions in one place. Numbers that were measured are read from
docs/benchmarks by `measured`; all others, in Machine and Work, are assumptions. No GPU was used.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "scale.md"
BEGIN, END = "<!-- by docs/make_scale.py -->", "<!-- until here -->"
GPUS = (1, 8, 64, 256, 1000)


@dataclass(frozen=True)
class Machine:
    """A GPU and what feeds it. None of this was measured.

    flops, bytes_s: of bfloat16 products and of the memory, and the share of each that is reached
    memory: bytes; dollars: rent of one GPU for an hour
    decode: images that the CPU cores beside one GPU open and resize in a second
    storage: bytes a second that the image store gives to all GPUs together
    driver: lines a second that one driver writes, each on the disk before the next ones
    """

    flops: float = 990e12
    bytes_s: float = 3.35e12
    reached_flops: float = 0.4
    reached_bytes: float = 0.6
    memory: float = 80e9
    dollars: float = 2.5
    decode: float = 200
    storage: float = 20e9
    driver: float = 20_000


@dataclass(frozen=True)
class Work:
    """A line: images, a question, an answer; and a decoder with the sizes of Qwen2-VL-7B.

    images: of the line, with `vision` tokens each
    vision_parameters: of the vision tower, which reads `merged` patches for each vision token
    image_bytes: of the file
    """

    parameters: float = 7.6e9
    vision_parameters: float = 0.675e9
    merged: int = 4
    layers: int = 28
    kv_heads: int = 4
    head: int = 128
    images: int = 1
    vision: int = 1280
    text: int = 40
    answer: int = 64
    image_bytes: float = 300e3


@dataclass(frozen=True)
class Pruning:
    """retention: share of vision K/V; prefill: time of a prefill over that without pruning."""

    retention: float = 1.0
    prefill: float = 1.0


WORKS = {
    "1 image, 64 tokens": Work(),
    "8 images, 64 tokens": Work(images=8),
    "8 images, 512 tokens": Work(images=8, answer=512),
    "8 images, 2,048 tokens": Work(images=8, answer=2048),
}
ENGINES = {"--ray": 1, "vLLM": 256}  # the most rows that decode at once


def measured() -> Pruning:
    """What docs/benchmarks says, on 2 CPU cores. Nothing else here was measured."""
    folder = DOCS / "benchmarks"
    rounds = json.loads((folder / "vllm/2026-11-23-capacity.json").read_text())["results"]["rounds"]
    retention = [found["96 MB, pruned, shared prefix"]["retention"] for found in rounds]
    prefill = json.loads((folder / "cpu/prefill.json").read_text())["prefill"]
    (slower,) = (row["over_stock"][0] for row in prefill if row["name"] == "pruned")
    return Pruning(statistics.median(retention), slower)


def kv_bytes(work: Work, vision: float) -> float:
    """Of a row in the middle of its answer, in bfloat16."""
    columns = work.images * vision + work.text + work.answer / 2
    return 2 * 2 * work.layers * work.kv_heads * work.head * columns


def seconds(machine: Machine, work: Work, pruning: Pruning, most: int) -> float:
    """Of one line on one GPU: its prefill alone, and its share of the decoding steps."""
    weights = 2 * (work.parameters + work.vision_parameters)
    vision = work.images * work.vision
    products = 2 * work.parameters * (vision + work.text)
    products += 2 * work.vision_parameters * vision * work.merged
    prefill = pruning.prefill * products / (machine.flops * machine.reached_flops)
    row = kv_bytes(work, work.vision * pruning.retention)
    rows = max(1, min(most, int((0.9 * machine.memory - weights) / row)))
    moved = (2 * work.parameters + rows * row) / (machine.bytes_s * machine.reached_bytes)
    computed = 2 * work.parameters * rows / (machine.flops * machine.reached_flops)
    return prefill + work.answer * max(moved, computed) / rows


def limits(
    machine: Machine, work: Work, pruning: Pruning, most: int, gpus: int
) -> dict[str, float]:
    """Images a second that each part of the whole could do."""
    return {
        "GPUs": work.images * gpus / seconds(machine, work, pruning, most),
        "CPU cores": gpus * machine.decode,
        "image store": machine.storage / work.image_bytes,
        "driver": work.images * machine.driver,
    }


def rows_of(pruned: Pruning) -> list[dict[str, Any]]:
    """For each work, engine and number of GPUs: images a second and what limits them, dollars for a
    million images, and the number of GPUs from which another part is the limit."""
    found = []
    machine = Machine()
    for name, work in WORKS.items():
        for engine, most in ENGINES.items():
            for gpus in GPUS:
                row: dict[str, Any] = {"work": name, "engine": engine, "gpus": gpus}
                for which, pruning in (("full", Pruning()), ("pruned", pruned)):
                    parts = limits(machine, work, pruning, most, gpus)
                    slowest = min(parts, key=lambda part: parts[part])
                    dollars = 1e6 / parts[slowest] * gpus * machine.dollars / 3600
                    shared = min(("image store", "driver"), key=lambda part: parts[part])
                    row[which] = {
                        "images_s": round(parts[slowest], 1),
                        "dollars": round(dollars, 1),
                        "limit": slowest,
                        "next_limit": shared,
                        "next_limit_from_gpus": int(parts[shared] / parts["GPUs"] * gpus),
                    }
                found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| a line | engine | images a second, 1 GPU, full | pruned | 1,000 GPUs, full | pruned | "
        "$ a million, full | pruned | the limit moves, pruned |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    for one, many in zip(rows[:: len(GPUS)], rows[len(GPUS) - 1 :: len(GPUS)], strict=True):
        cells = [one["work"], one["engine"]]
        cells += [f"{row[w]['images_s']:,.1f}" for row in (one, many) for w in ("full", "pruned")]
        cells += [f"{one[which]['dollars']:,.0f}" for which in ("full", "pruned")]
        last = many["pruned"]
        cells.append(f"to the {last['next_limit']} from {last['next_limit_from_gpus']:,} GPUs")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    pruned = measured()
    rows = rows_of(pruned)
    assumed = {"machine": asdict(Machine()), "works": {n: asdict(w) for n, w in WORKS.items()}}
    found = {"measured": asdict(pruned), "assumed": assumed, "rows": rows}
    (DOCS / "scale.json").write_text(json.dumps(found, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
