"""The largest context that decodes in a limited memory, with 4-bit weights: stock against pruned.

    OMP_NUM_THREADS=1 python dev/studies/largest_context.py --limits 4,8 [--layers 28] [--json]

Every trial is a process of its own whose data segment is limited (RLIMIT_DATA). It fills the cache
of a prompt layer by layer, as pruning during a prompt does, with one layer in full at a time, and
decodes a token. Whether it ends decides; nothing is computed from sizes but the first guess. The
hidden states of the prompt are not part of it: they are the same for all ways.

The model is built once. The trials are forks of that process, hence the single thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.bench import caches, machine
from plphp.bench.caches import Schedule, Setting
from plphp.bench.shapes import Shape, build, shape_of
from plphp.hf import compat
from plphp.inputs.rounding import frugal
from plphp.weights import round_weights, weight_bytes

GIB = 1 << 30
STEP = 256  # contexts are multiples of it
NEAR = 0.02  # how near what fits and what does not are to each other in the end
# name -> share of vision tokens that is kept, and bits of kept codes
WAYS: dict[str, tuple[float, int | None]] = {
    "stock": (1.0, None),
    "40 % kept": (0.4, None),
    "40 % kept in 4 bits": (0.4, 4),
    "40 % kept in 2 bits": (0.4, 2),
}


@dataclass(frozen=True)
class Zeros(Setting):
    """A setting whose keys and values are zeros, which are drawn faster."""

    def pair(self, columns: int) -> tuple[Tensor, Tensor]:
        size = (self.batch, self.shape.kv_heads, columns, self.shape.head_dim)
        return torch.zeros(size, dtype=self.dtype), torch.zeros(size, dtype=self.dtype)


def decode(model: Any, shape: Shape, context: int, way: str) -> None:
    """Fill the cache of a prompt of so many columns in one way, and decode a token."""
    setting = Zeros(shape, context, 1, 8, torch.bfloat16, "cpu")
    share, bits = WAYS[way]
    token = torch.ones(1, 1, dtype=torch.int64)

    def step(cache: Any) -> None:
        places = torch.full_like(token, context)
        model(input_ids=token, position_ids=places, use_cache=True, **{compat.CACHE: cache})

    if way == "stock":
        step(caches.dynamic(model, setting, context))
        return
    policy = Schedule((share,))
    with plphp.prune(model, policy, vision_mask=setting.spans(), kv_bits=bits):
        step(caches.pruned(model, setting, policy))


def runs(limit: int, work: Callable[[], None]) -> bool:
    """Whether some work ends in a fork of this process with at most `limit` bytes of data."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    code = 1
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        with torch.inference_mode():
            work()
        code = 0
    finally:
        os._exit(code)


def largest(fits: Callable[[int], bool], guess: int) -> int:
    """The largest context that fits, found by trials around a guess."""
    low, high, size = 0, 0, max(guess // STEP, 1)
    while not (low and high):
        if fits(size * STEP):
            low, size = size, int(size * 1.05) + 1
        else:
            high, size = size, max(int(size * 0.95), 1)
    while high - low > max(1, int(low * NEAR)):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def data_bytes() -> int:
    """Bytes of the data segment of this process, which RLIMIT_DATA limits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmData"))


def study(limits: list[int], layers: int) -> dict[str, Any]:
    shape = shape_of("qwen2-vl-2b", layers)
    model = build(shape, torch.bfloat16, "meta").to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    with frugal():
        round_weights(model, 4)
    base, found = data_bytes(), []
    for limit in limits:
        for way, (share, bits) in WAYS.items():
            kept = share * (1 if bits is None else {4: 0.29, 2: 0.16}[bits])
            held = 0 if way == "stock" else 2 / layers  # in full, while a prompt is pruned
            each = shape.kv_bytes(1, 2) * (kept + held)

            def fits(context: int, way: str = way, limit: int = limit) -> bool:
                ok = runs(limit, lambda: decode(model, shape, context, way))
                print(f"{limit / GIB:g} GiB, {way}, {context:,}: {ok}", file=sys.stderr, flush=True)
                return ok

            context = largest(fits, int((limit - base) / each))
            found.append({"gib": limit / GIB, "way": way, "context": context})
    about = {"before": base, "weights": weight_bytes(model), "layers": layers}
    return {"about": {**machine.describe("cpu"), **about}, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", default="4,8", help="GiB, with commas between them")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    limits = [int(float(limit) * GIB) for limit in given.limits.split(",")]
    found = study(limits, given.layers)
    if given.json:
        print(json.dumps(found, indent=1))
        return
    stock = {one["gib"]: one["context"] for one in found["found"] if one["way"] == "stock"}
    for one in found["found"]:
        ratio = one["context"] / stock[one["gib"]]
        print(f"{one['gib']:g} GiB  {one['way']:<22} {one['context']:>9,}  {ratio:.2f}")
    print(found["about"])


if __name__ == "__main__":
    main()
