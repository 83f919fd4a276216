"""Decoding with two stages against the cache method alone, at the same bytes, A B A B.

    python dev/studies/stage_decode.py --batch 8 --context 2080 --budget .2 --out FILE

The model is that of `plphp bench --first-token`: random weights, the shape of Qwen2-VL-2B with some
of its layers. What is dropped before layer 0 leaves the cache shorter by whole columns, and what a
cache method drops leaves it shorter by tokens of single heads: a step reads the same bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch

import plphp
from plphp.bench import first_token, machine
from plphp.bench.caches import Setting
from plphp.bench.decode import Decoded, decode_in_turn
from plphp.bench.shapes import shape_of
from plphp.bench.ways import Way


def ways(budget: float) -> list[Way]:
    """Pairs of a cache method and the same behind `divprune`, after the full cache."""
    found = [Way("full")]
    for name in ("novelty", "plphp"):
        for stages in (name, f"divprune/{name}"):
            found.append(Way(stages, plphp.policy(stages, budget=budget)))
    return found


def row(one: Decoded, against: Decoded) -> dict[str, Any]:
    """The times of a way, and its ratio to another one: median, lowest, highest of the rounds."""
    pairs = zip(one.steps, against.steps, strict=True)
    ratios = [median(mine) / median(theirs) for mine, theirs in pairs]
    return {
        "name": one.way.name,
        "kv_bytes": one.kv_bytes,
        "kept": round(one.on_device, 4),
        "ms": round(one.step_ms, 2),
        "over": against.way.name,
        "ratio": [round(f(ratios), 3) for f in (median, min, max)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=2080)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    dtype, shape = getattr(torch, options.dtype), shape_of("qwen2-vl-2b", options.layers)
    setting = Setting(shape, options.context, options.batch, options.images, dtype, "cpu")
    model = first_token.build(shape, dtype, "cpu")
    inputs = first_token.prompt(model, setting)
    found = decode_in_turn(model, inputs, ways(options.budget), options.steps, options.rounds)
    rows = [row(one, found[0]) for one in found]
    rows += [row(found[i + 1], found[i]) for i in (1, 3)]
    result = {
        "about": machine.describe("cpu"),
        "setting": {k: v for k, v in vars(options).items() if k != "out"},
    }
    options.out.write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    for line in rows:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
