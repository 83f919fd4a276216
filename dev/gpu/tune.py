"""Measure what `attention/tuned.py` holds: python3 dev/gpu/tune.py [--dry]

Prints JSON: for rows of equal length ("plain") and rows that need a mask ("masked"), the time of
PyTorch's attention and of the Triton kernel at several lengths, and the time of the Triton kernel
at several numbers of splits. `take.py` chooses the constants from it. The heads are those of
qwen2-vl-7b and of llava-1.5-7b.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from plphp.attention import attend, flash_decode
from plphp.attention.launch import MOST_SPLITS, multiprocessors_of, tile_of
from plphp.bench.machine import describe

DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
HEADS = ((1, 2),) if DRY else ((4, 7), (32, 1))  # KV heads, and query heads for each
SLOTS = (64, 100) if DRY else (256, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = (1,) if DRY else (1, 8)
SPLITS = (1, 2) if DRY else (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
MOST = 1 << 31  # bytes of keys: longer ones are left out
CALLS = 1 if DRY else 20
TURNS = 1 if DRY else 5  # not counting the first, which compiles


def seconds(step: Callable[[], Any]) -> float:
    """Seconds of one call, when many are launched one after the other: the least of a few turns.

    So the longer of the launch on the host and the work on the device counts, as in a decode step.
    """
    found = []
    for _ in range(TURNS + 1):
        _wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            step()
        _wait()
        found.append((time.perf_counter() - start) / CALLS)
    return min(found[1:])


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def case(rows: int, kv: int, groups: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values in bfloat16 with heads of 128 numbers."""
    size = (rows, kv, slots, 128)
    k, v = (torch.randn(size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    return torch.randn(rows, kv * groups, 1, 128, dtype=torch.bfloat16, device=DEVICE), k, v


def kernels(rows: int, kv: int, groups: int, slots: int) -> list[dict[str, Any]]:
    """Both kernels with and without a mask."""
    q, k, v = case(rows, kv, groups, slots)
    start = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    end = torch.tensor(slots, device=DEVICE)
    mask = torch.ones(rows, 1, 1, slots, dtype=torch.bool, device=DEVICE)
    steps = {
        "plain": (
            partial(attend, q, k, v, None, 0.1),
            partial(flash_decode.attend, q, k, v, start, slots, 0.1),
        ),
        "masked": (
            partial(attend, q, k, v, mask, 0.1),
            partial(flash_decode.attend, q, k, v, start, end, 0.1),
        ),
    }
    about = {"rows": rows, "kv": kv, "groups": groups, "slots": slots}
    return [
        {**about, "kind": kind, "sdpa": seconds(sdpa), "triton": seconds(triton)}
        for kind, (sdpa, triton) in steps.items()
    ]


def splits(rows: int, kv: int, groups: int, slots: int) -> dict[str, Any]:
    """The Triton kernel with several numbers of splits."""
    q, k, v = case(rows, kv, groups, slots)
    start = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    blocks = -(-slots // tile_of(q, kv, 128).keys)
    found = {
        count: seconds(partial(flash_decode.attend, q, k, v, start, slots, 0.1, splits=count))
        for count in SPLITS
        if count <= min(blocks, MOST_SPLITS)
    }
    return {"programs": rows * kv, "blocks": blocks, "slots": slots, "seconds": found}


def main() -> None:
    sizes = [
        (rows, kv, groups, slots)
        for slots in SLOTS
        for rows in ROWS
        for kv, groups in HEADS
        if rows * kv * slots * 256 <= MOST
    ]
    with torch.inference_mode():
        found = {
            "about": describe(DEVICE),
            "multiprocessors": multiprocessors_of(torch.device(DEVICE)),
            "kernels": [row for size in sizes for row in kernels(*size)],
            "splits": [splits(*size) for size in sizes if size[3] >= SLOTS[1]],
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
