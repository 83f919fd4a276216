"""The arguments, block sizes, splits and buffers of a launch of the attention kernels.

To import this module, Triton must be installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from plphp.attention.tuned import COSTS, Costs

Launching = TypeVar("Launching", bound=Callable[..., Tensor])

STAGE_BYTES = 32 * 1024  # bytes of keys and values that a pipeline stage loads
# Two stages are loaded while one is computed with. A program takes 70 to 98 KiB of shared memory.
STAGES = 3
MOST_ROWS, MOST_SPLITS = 32, 64


class Launch(NamedTuple):
    """Which slots a launch attends to, and how.

    The fields are the arguments of `flash_decode.attend` with the same names.
    """

    start: Tensor
    end: int | Tensor
    scale: float
    softcap: float | None
    columns: Tensor | None
    logical: int | Tensor
    window: int
    new_mask: Tensor | None


def on_the_queries_device(launch: Launching) -> Launching:
    """Decorator that makes the device of the first argument current, where Triton launches."""

    @wraps(launch)
    def launched(q: Tensor, *args: Any, **options: Any) -> Tensor:
        with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
            return launch(q, *args, **options)

    return launched  # type: ignore[return-value]


@dataclass(frozen=True)
class Tile:
    """Block sizes of a launch: query rows, keys, head sizes padded to powers of two."""

    rows: int
    keys: int
    dim: int
    value_dim: int


def tile(rows: int, dim: int, value_dim: int, itemsize: int) -> Tile:
    """The block sizes of a launch.

    rows: query heads of a KV head times new tokens; dim, value_dim: D and Dv
    itemsize: bytes of a number
    """
    padded, value_padded = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    keys = STAGE_BYTES // (2 * max(padded, value_padded) * itemsize)
    rows = min(max(16, triton.next_power_of_2(rows)), MOST_ROWS)
    return Tile(rows, min(max(keys, 16), 128), padded, value_padded)


def tile_of(q: Tensor, kv_heads: int, value_dim: int) -> Tile:
    """The block sizes for queries (B, H, T, D)."""
    _, heads, queries, dim = q.shape
    return tile(heads // kv_heads * queries, dim, value_dim, q.element_size())


def splits_of(q: Tensor, kv_heads: int, block: Tile, blocks: int) -> int:
    """The number of splits for queries (B, H, T, D) and a number of blocks of keys."""
    rows = q.shape[1] // kv_heads * q.shape[2]
    programs = q.shape[0] * kv_heads * triton.cdiv(rows, block.rows)
    return split_count(programs, blocks, multiprocessors_of(q.device))


def warps(dtype: torch.dtype) -> int:
    """Warps of a program. Float32 products use no tensor cores: with 4 warps registers spill."""
    return 8 if dtype == torch.float32 else 4


@lru_cache(maxsize=4096)
def split_count(programs: int, blocks: int, multiprocessors: int, costs: Costs = COSTS) -> int:
    """The number of splits into which the keys of every program are cut, 1 to MOST_SPLITS.

    programs: number of (row, KV head, query block) triples
    blocks: blocks of keys in the capacity of the buffers

    It minimises an estimate of the time, in units of the time that a block takes: the number of
    waves of programs times the blocks that each program reads, with the costs of starting a program
    and of the second kernel.
    """
    concurrent = multiprocessors * costs.resident

    def cost(splits: int) -> int:
        waves = -(-programs * splits // concurrent)
        return waves * (-(-blocks // splits) + costs.start) + (costs.second if splits > 1 else 0)

    return min(range(1, max(1, min(blocks, MOST_SPLITS)) + 1), key=cost)


def multiprocessors_of(device: torch.device) -> int:
    """The number of multiprocessors of a device."""
    if device.type != "cuda":
        return 132  # those of an H200, so that the interpreter tests the paths of a GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def new_parts(q: Tensor, splits: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Buffers for the results of splits, float32: (B, H, T, splits, Dv) and (B, H, T, splits)."""
    rows = (*q.shape[:3], splits)
    part = torch.empty(*rows, value_dim, dtype=torch.float32, device=q.device)
    return part, torch.empty(rows, dtype=torch.float32, device=q.device)


def empty_output(q: Tensor, value_dim: int) -> Tensor:
    """(B, H, T, Dv), in memory as (B, T, H, Dv), the layout that the model uses next."""
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
