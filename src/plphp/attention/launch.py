"""What a launch of the attention kernels needs: its arguments, block sizes, splits and buffers.

Importing this module needs Triton, as importing the kernels does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

Launching = TypeVar("Launching", bound=Callable[..., Tensor])

STAGE_BYTES = 32 * 1024  # keys and values in flight a pipeline stage
STAGES = 3  # two in flight beside the one computed with: 70 to 98 KiB of shared memory a program
RESIDENT = 2  # programs a multiprocessor runs at a time: 128 KiB in flight hide Hopper's latency
MOST_ROWS, MOST_SPLITS = 32, 64


class Launch(NamedTuple):
    """Which slots a launch attends to, and how. The fields are those of `flash_decode.attend`.

    start: (B,) int64; end and logical: an int, or a 0-dim integer tensor that kernels read
    positions: (B, Hkv, C) int32, None without a sliding window; among: (B or 1, 1, T, T) bool
    """

    start: Tensor
    end: int | Tensor
    scale: float
    softcap: float | None
    positions: Tensor | None
    logical: int | Tensor
    window: int
    among: Tensor | None


def on_the_queries_device(launch: Launching) -> Launching:
    """Launch where the first argument lies: Triton's device is PyTorch's current one."""

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
    """Blocks for `rows` query rows of a KV head; as many keys as a pipeline stage holds."""
    padded, value_padded = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
    keys = STAGE_BYTES // (2 * max(padded, value_padded) * itemsize)
    rows = min(max(16, triton.next_power_of_2(rows)), MOST_ROWS)
    return Tile(rows, min(max(keys, 16), 128), padded, value_padded)


def tile_of(q: Tensor, kv_heads: int, value_dim: int) -> Tile:
    """The blocks that queries (B, H, T, D) take."""
    _, heads, queries, dim = q.shape
    return tile(heads // kv_heads * queries, dim, value_dim, q.element_size())


def splits_of(q: Tensor, kv_heads: int, block: Tile, blocks: int) -> int:
    """Into how many splits so many blocks of keys are cut for queries (B, H, T, D)."""
    rows = q.shape[1] // kv_heads * q.shape[2]
    programs = q.shape[0] * kv_heads * triton.cdiv(rows, block.rows)
    return split_count(programs, blocks, multiprocessors_of(q.device))


def warps(dtype: torch.dtype) -> int:
    """Warps of a program. Float32 products have no tensor cores: with 4 their registers spill."""
    return 8 if dtype == torch.float32 else 4


@lru_cache(maxsize=4096)
def split_count(programs: int, blocks: int, multiprocessors: int) -> int:
    """Into how many splits the keys of every program are cut, 1 to MOST_SPLITS.

    programs: (row, KV head, query block) triples; blocks: of keys in the buffers' capacity.
    The least time in units of a block's: waves of programs times what each of them reads, where
    starting a program costs about two blocks and the second kernel about as much as four.
    """
    slots = multiprocessors * RESIDENT

    def cost(splits: int) -> int:
        waves = -(-programs * splits // slots)
        return waves * (-(-blocks // splits) + 2) + (4 if splits > 1 else 0)

    return min(range(1, max(1, min(blocks, MOST_SPLITS)) + 1), key=cost)


def multiprocessors_of(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    if device.type != "cuda":
        return 132  # of an H200: the interpreter takes the paths that a GPU would
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def new_parts(q: Tensor, splits: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Room for the results of splits: (B, H, T, splits, Dv) and (B, H, T, splits), float32."""
    rows = (*q.shape[:3], splits)
    part = torch.empty(*rows, value_dim, dtype=torch.float32, device=q.device)
    return part, torch.empty(rows, dtype=torch.float32, device=q.device)


def empty_output(q: Tensor, value_dim: int) -> Tensor:
    """(B, H, T, Dv) laid out as (B, T, H, Dv), which is what the model goes on with."""
    batch, heads, queries, _ = q.shape
    return q.new_empty(batch, queries, heads, value_dim).transpose(1, 2)
