"""The largest context that decodes in a limited memory, with 4-bit weights: stock against pruned.

    OMP_NUM_THREADS=1 python dev/studies/largest_context.py --limits 4,8 --out runs/largest.jsonl

Every trial is a process of its own whose data segment is limited (RLIMIT_DATA). It fills the cache
of a prompt layer by layer, as pruning during a prompt does, with one layer in full at a time, and
decodes a token. Whether it ends decides; what it took says where to look next. The hidden states of
the prompt are not part of it: they are the same for all ways.

The search uses short trials, which prune the first and the last layer and copy the first to the
others. What the page says has run with every layer pruned ("whole"); the least that does not fit
may be a short trial. Trials are appended to `--out`; a second call goes on where the first ended.

The model is on memory that nothing was written to, and the trials are forks of its process, hence
the single thread.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.bench import caches, machine
from plphp.bench.caches import Schedule, Setting
from plphp.bench.shapes import Shape, build, shape_of
from plphp.hf import compat
from plphp.inputs.rounding import MMAP_THRESHOLD
from plphp.weights import linear, round_weights, weight_bytes

GIB = 1 << 30
STEP = 256  # contexts are multiples of it
# glibc gives freed blocks of this size back at once, and no longer from 32 MiB only. Otherwise the
# keys of a layer that were freed stay with the process, half a cache for stock with 4 GiB.
LARGE = 4 << 20
NEAR = 0.02  # how near what fits and what does not are to each other in the end
# name -> share of vision tokens that is kept, and bits of kept codes
WAYS: dict[str, tuple[float, int | None]] = {
    "stock": (1.0, None),
    "40 % kept": (0.4, None),
    "40 % kept in 4 bits": (0.4, 4),
    "40 % kept in 2 bits": (0.4, 2),
}


@dataclass(frozen=True)
class Trial:
    """One trial.

    room: bytes that it was allowed beyond those of the process; grown: bytes that it took, if it
        ended; whole: whether every layer was pruned
    """

    limit: int
    way: str
    layers: int
    context: int
    whole: bool
    ok: bool
    room: int
    grown: int


@dataclass(frozen=True)
class Unwritten(Setting):
    """A setting whose keys and values are memory that nothing was written to."""

    def pair(self, columns: int) -> tuple[Tensor, Tensor]:
        size = (self.batch, self.shape.kv_heads, columns, self.shape.head_dim)
        return torch.empty(size, dtype=self.dtype), torch.empty(size, dtype=self.dtype)


def decode(model: Any, shape: Shape, context: int, way: str, whole: bool = True) -> None:
    """Fill the cache of a prompt of so many columns in one way, and decode a token."""
    setting = Unwritten(shape, context, 1, 8, torch.bfloat16, "cpu")
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
        cache = plphp.PrunedCache(model)
        step(
            caches.pruned(model, setting, policy, cache) if whole else short(cache, setting, policy)
        )


def short(cache: Any, setting: Setting, policy: Schedule) -> Any:
    """As `caches.pruned`, with only the first and the last layer pruned; the others are copies."""
    indices = [index for index, _ in cache.pruned_layers()]
    for index in indices:
        if 0 < index < indices[-1]:
            first, layer = cache.layers[0], cache.layers[index]
            layer.store, layer.codes = copy.deepcopy(first.store), copy.deepcopy(first.codes)
            layer.is_initialized, layer.raw = True, False
            continue
        caches.fill(cache, setting, policy, [index])
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64)
    return cache


def status(name: str) -> int:
    """Bytes of this process: VmData, which RLIMIT_DATA limits, or VmSize, or its peak VmPeak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def grown(limit: int, work: Callable[[], None]) -> int:
    """Bytes that some work takes in a fork of this process, 0 if `limit` bytes are not enough."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            before = status("VmSize")
            with torch.inference_mode():
                work()
            os.write(write, str(status("VmPeak") - before).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as file:
        return int(file.read() or 0)


def result(trials: Sequence[Trial]) -> tuple[int, int]:
    """The largest context that ran with every layer pruned, and the least that does not fit."""
    low = max((t.context for t in trials if t.ok and t.whole), default=0)
    high = min((t.context for t in trials if not t.ok), default=0)
    return low, high


def following(trials: Sequence[Trial], guess: int) -> tuple[int, bool] | None:
    """The context of the next trial, and whether every layer is pruned in it; None at the end."""
    low, high = result(trials)
    # A short trial may run where one with every layer pruned did not.
    run = [t for t in trials if t.ok and (not high or t.context < high)]
    ran = max(run, key=lambda t: t.context, default=None)
    if ran is None:
        return (int(high * 0.9) if high else guess // 2), False
    near = high and high - ran.context <= NEAR * ran.context
    if near and low == ran.context:
        return None
    if near:
        return ran.context, True
    if high:
        middle = (ran.context + high) // 2
        return max(middle, int(high * 0.985)), any(t.whole and not t.ok for t in trials)
    expected = ran.context * ran.room / ran.grown
    return max(int(expected * 0.995), int(ran.context * 1.015)), False


@dataclass(frozen=True)
class Study:
    """A model, and the file of its trials."""

    model: Any
    shape: Shape
    file: Path

    def trials(self, limit: int, way: str) -> list[Trial]:
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        every = (Trial(**json.loads(line)) for line in lines)
        return [t for t in every if (t.limit, t.way, t.layers) == (limit, way, self.shape.layers)]

    def guess(self, limit: int, way: str) -> int:
        """What arithmetic says: the kept tokens, and one layer in full."""
        share, bits = WAYS[way]
        kept = share * (1 if bits is None else {4: 0.29, 2: 0.16}[bits])
        each = self.shape.kv_bytes(1, 2) * (kept + 1 / self.shape.layers)
        return int((limit - status("VmData")) / each)

    def run(self, limit: int, way: str, until: float) -> None:
        """Search on until the answer is known, or the time has come."""
        while time.monotonic() < until:
            trials = self.trials(limit, way)
            found = following(trials, self.guess(limit, way))
            if found is None:
                return
            context, whole = found[0] // STEP * STEP, found[1] or way == "stock"
            room = limit - status("VmData")
            took = grown(limit, lambda: decode(self.model, self.shape, context, way, whole))  # noqa: B023
            trial = Trial(limit, way, self.shape.layers, context, whole, took > 0, room, took)
            with self.file.open("a") as file:
                file.write(json.dumps(asdict(trial)) + "\n")
            print(trial, file=sys.stderr, flush=True)


def made(layers: int) -> tuple[Any, Shape]:
    """The model with weights of 4 bits, none of which were ever written."""
    shape = shape_of("qwen2-vl-2b", layers)
    model = build(shape, torch.bfloat16, "meta")
    linear.BLOCK = 1 << 40  # on the meta device a weight need not be rounded piece by piece
    round_weights(model, 4)
    return model.to_empty(device="cpu"), shape


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limits", default="4,8", help="GiB, with commas between them")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--out", type=Path, required=True, help="file of the trials")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no trial after them")
    given = parser.parse_args()
    until = time.monotonic() + given.seconds
    torch.set_num_threads(1)
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    study = Study(*made(given.layers), given.out)
    limits = [int(float(limit) * GIB) for limit in given.limits.split(",")]
    for limit in limits:
        for way in WAYS:
            study.run(limit, way, until)
    for limit in limits:
        stock = result(study.trials(limit, "stock"))[0] or 1
        for way in WAYS:
            low, high = result(study.trials(limit, way))
            done = following(study.trials(limit, way), 1) is None
            print(
                f"{limit / GIB:g} GiB  {way:<20} {low:>9,} fits, {high:>9,} does not, "
                f"{low / stock:.2f} of stock{'' if done else ', not finished'}"
            )
    print(machine.describe("cpu"), "weights", weight_bytes(study.model), "data", status("VmData"))


if __name__ == "__main__":
    main()
