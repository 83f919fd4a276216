"""Attention of a few new tokens over one layer's buffers: a Triton kernel split along the keys.

A decode step reads the whole cache once and computes little, so its time depends on how many
multiprocessors read at the same time. One program computes one KV head of one row, for all G query
heads that read it, so that keys and values are read once. If there are few rows and KV heads, the
keys are cut into splits, one program each, and a second kernel adds up their results (flash
decoding: Dao et al. 2023, "Flash-Decoding for long-context inference"; the sums are those of online
softmax, Milakov & Gimelshein 2018, arXiv 1805.02867).

Lengths may be on the device. The grid depends only on the capacity of the buffers, and a program
reads the start and the end of its row itself. So a step can be captured in a CUDA graph and
replayed at any length.

To import this module, Triton must be installed; `plphp.attention.choose` imports it on first use.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from plphp.attention.launch import (
    STAGES,
    Launch,
    empty_output,
    new_parts,
    on_the_queries_device,
    splits_of,
    tile_of,
    warps,
)

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # finite, so that a block without visible keys yields no NaN
INTERPRETED = bool(triton.knobs.runtime.interpret)


# Without this, Triton would compile again for lengths that are 1 or a multiple of 16.
@triton.jit(
    do_not_specialize=["end_or_ptr", "logical_or_ptr", "window", "heads", "splits", "all_splits"]
)
def _split_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, end_or_ptr, columns_ptr, logical_or_ptr,
    new_mask_ptr, scale, softcap, window, heads, splits, all_splits,
    q_b, q_h, q_t, k_b, k_h, v_b, v_h, o_b, o_h, o_t, o_s, p_b, p_h, a_b, a_t,
    K_S: tl.constexpr, K_D: tl.constexpr, V_S: tl.constexpr, V_D: tl.constexpr, Q_D: tl.constexpr,
    P_S: tl.constexpr, A_S: tl.constexpr,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ON_DEVICE: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, NEW_MASK: tl.constexpr,
    SPLIT: tl.constexpr, FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """One split of one KV head of one row: its softmax-weighted values and their log-sum-exp.

    A row of the tile is a pair of a query head of the group and a new token. With SPLIT the output
    is float32 (B, H, T, all_splits, Dv) and lse (B, H, T, all_splits) in base 2, of which this
    kernel writes `splits`. Without it the output (B, H, T, Dv) is final.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    end, logical = end_or_ptr, logical_or_ptr
    if ON_DEVICE:
        end = tl.load(end_or_ptr).to(tl.int32)
        if WINDOW:
            logical = tl.load(logical_or_ptr).to(tl.int32)
    first = tl.load(start_ptr + row).to(tl.int32)
    blocks = tl.cdiv(end - first, BLOCK_N)
    share = tl.cdiv(blocks, splits) * BLOCK_N
    low = first + split * share
    high = tl.minimum(low + share, end)

    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < GROUPS * QUERIES
    head, token = kv_head * GROUPS + m // QUERIES, m % QUERIES
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = tl.load(
        q_ptr + row * q_b + (head * q_h + token * q_t)[:, None] + d[None, :] * Q_D,
        mask=real[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    k_at = k_ptr + row * k_b + kv_head * k_h + d[None, :] * K_D
    v_at = v_ptr + row * v_b + kv_head * v_h + dv[None, :] * V_D
    p_at = columns_ptr
    if WINDOW:
        p_at += row * p_b + kv_head * p_h

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for begin in range(low, high, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        inside = n < high
        k = tl.load(k_at + n[:, None] * K_S, mask=inside[:, None] & (d < DIM)[None, :], other=0.0)
        logits = dot(q, tl.trans(k), FLOAT32_DOT) * scale
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        visible = inside[None, :]
        if NEW_MASK:  # a mask says which of the new columns attend to each other
            place = n - (end - QUERIES)
            new = place >= 0
            at = new_mask_ptr + row * a_b + token[:, None] * a_t + place[None, :] * A_S
            allowed = tl.load(at, mask=(new & inside)[None, :], other=0) != 0
            visible = visible & (allowed | (~new)[None, :])
        elif QUERIES > 1:
            visible = visible & (n[None, :] <= (end - QUERIES + token)[:, None])
        if WINDOW:
            column = tl.load(p_at + n * P_S, mask=inside, other=0)
            in_window = column[None, :] > (logical - QUERIES + token - window)[:, None]
            if NEW_MASK:
                in_window = in_window | new[None, :]
            visible = visible & in_window
        v = tl.load(
            v_at + n[:, None] * V_S, mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0
        )
        top, mass, total = add(top, mass, total, logits, visible, v, FLOAT32_DOT)

    o_at = out_ptr + row * o_b + (head * o_h + token * o_t)[:, None] + split * o_s + dv[None, :]
    at = lse_ptr + ((row * heads * GROUPS + head) * QUERIES + token) * all_splits + split
    store(o_at, at, top, mass, total, real, (dv < VALUE_DIM)[None, :], SPLIT)


@triton.jit
def add(top, mass, total, logits, visible, v, FLOAT32_DOT: tl.constexpr):
    """Online softmax: add a block of logits (M, N) and values (N, Dv).

    top: (M,) largest logit so far; mass: (M,) sum of exponentials; total: (M, Dv) weighted values
    """
    logits = tl.where(visible, logits * LOG2E, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    p = tl.exp2(logits - higher[:, None])
    decay = tl.exp2(top - higher)
    mass = mass * decay + tl.sum(p, 1)
    total = total * decay[:, None] + dot(p.to(v.dtype), v, FLOAT32_DOT)
    return higher, mass, total


@triton.jit
def store(out_ptr, lse_ptr, top, mass, total, rows, columns, SPLIT: tl.constexpr):
    """Write the softmax-weighted values of a tile and, with SPLIT, their log-sum-exp."""
    out = (
        total / tl.where(mass > 0, mass, 1.0)[:, None]
    )  # zeros for a query that attends to nothing
    tl.store(out_ptr, out.to(out_ptr.dtype.element_ty), mask=rows[:, None] & columns)
    if SPLIT:
        lse = tl.where(mass > 0, top + tl.log2(tl.where(mass > 0, mass, 1.0)), float("-inf"))
        tl.store(lse_ptr, lse, mask=rows)


@triton.jit
def _reduce_kernel(
    part_ptr, lse_ptr, out_ptr, splits, all_heads, o_b, o_h, o_t,
    QUERIES: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Add up the splits of one query: parts (B, H, T, splits, Dv), lse (B, H, T, splits)."""
    query = tl.program_id(0).to(tl.int64)
    row, head, token = query // QUERIES // all_heads, query // QUERIES % all_heads, query % QUERIES
    s = tl.arange(0, BLOCK_S)
    dv = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    lse = tl.load(lse_ptr + query * splits + s, mask=s < splits, other=float("-inf"))
    top = tl.maximum(tl.max(lse, 0), LOWEST)
    weight = tl.exp2(lse - top)
    part = tl.load(
        part_ptr + (query * splits + s)[:, None] * VALUE_DIM + dv[None, :],
        mask=(weight > 0)[:, None] & (dv < VALUE_DIM)[None, :],
        other=0.0,
    )
    mass = tl.sum(weight, 0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(mass > 0, mass, 1.0)
    at = out_ptr + row * o_b + head * o_h + token * o_t + dv
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=dv < VALUE_DIM)


@triton.jit
def dot(a, b, FLOAT32_DOT: tl.constexpr):
    """a (M, K) times b (K, N), summed in float32."""
    if FLOAT32_DOT:  # Triton's interpreter multiplies bfloat16 as if it were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh, computed from exp2."""
    decay = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    return tl.where(x < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: int | Tensor,
    scale: float,
    softcap: float | None = None,
    columns: Tensor | None = None,
    logical: int | Tensor | None = None,
    window: int = 0,
    new_mask: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv), in the dtype of q, of the last T columns of k and v.

    q: (B, H, T, D) float32, bfloat16 or float16
    k, v: (B, Hkv, C, D) and (B, Hkv, C, Dv), whole buffers with any strides, in the dtype of q
    start, end: (B,) int64, and an int or a 0-dim integer tensor: row b uses the slots
        [start[b], end), and no other slot is read. A query attends to all of them up to its own
    scale: factor of the logits
    softcap: logits x become softcap * tanh(x / softcap)
    columns: (B, Hkv, C) int32, the column in each slot; without it there is no sliding window
    logical: logical length, an int or a 0-dim integer tensor; by default `end`
    window: size of the sliding window in columns
    new_mask: (B or 1, 1, T, T) bool, which of the last T slots attend to which of them; by default
        each attends to itself and those before it
    splits: number of splits along the keys; by default `split_count` for this device

    The output of a query that attends to no slot is 0.
    """
    logical = end if logical is None else logical
    launch = Launch(start, end, scale, softcap, columns, logical, window, new_mask)
    if isinstance(end, Tensor) and torch.compiler.is_compiling():
        return _op(q, k, v, *launch, splits)  # type: ignore[no-any-return]
    return _launch(q, k, v, launch, splits)


@on_the_queries_device
def _launch(q: Tensor, k: Tensor, v: Tensor, launch: Launch, splits: int | None) -> Tensor:
    """Launch the kernel, and the second one if there are several splits."""
    if splits is None:
        block = tile_of(q, k.shape[1], v.shape[3])
        splits = splits_of(q, k.shape[1], block, triton.cdiv(k.shape[2], block.keys))
    out = empty_output(q, v.shape[3])
    if splits == 1:
        launch_splits(q, k, v, launch, out[..., None, :], None)
        return out
    part, lse = new_parts(q, splits, v.shape[3])
    launch_splits(q, k, v, launch, part, lse)
    return reduce(part, lse, out)


def launch_splits(
    q: Tensor, k: Tensor, v: Tensor, launch: Launch, part: Tensor, lse: Tensor | None
) -> None:
    """Launch the kernel of the splits.

    It writes part (B, H, T, splits, Dv) and lse (B, H, T, splits). Without lse there is one split,
    and part is the final output.
    """
    (batch, heads, queries, dim), (kv_heads, value_dim) = q.shape, v.shape[1::2]
    groups = heads // kv_heads
    block = tile_of(q, kv_heads, value_dim)
    # The kernel does not read `columns` without a window or `mask` without a mask. Then it is given
    # the pointer of another tensor.
    columns = k if launch.columns is None else launch.columns
    mask = k if launch.new_mask is None else launch.new_mask
    row_blocks = triton.cdiv(groups * queries, block.rows)
    _split_kernel[batch * kv_heads, part.shape[3], row_blocks](
        q, k, v, part, part if lse is None else lse, launch.start, launch.end, columns,
        launch.logical, mask, launch.scale, launch.softcap or 0.0, launch.window,
        kv_heads, part.shape[3], 1 if lse is None else lse.stride(2),
        *q.stride()[:3], *k.stride()[:2], *v.stride()[:2], *part.stride()[:4],
        *columns.stride()[:2], mask.stride(0) if len(mask) > 1 else 0, mask.stride(-2),
        K_S=k.stride(2), K_D=k.stride(3), V_S=v.stride(2), V_D=v.stride(3), Q_D=q.stride(3),
        P_S=columns.stride(2), A_S=mask.stride(-1),
        GROUPS=groups, QUERIES=queries, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_M=block.rows, BLOCK_N=block.keys, BLOCK_D=block.dim, BLOCK_V=block.value_dim,
        ON_DEVICE=isinstance(launch.end, Tensor), SOFTCAP=launch.softcap is not None,
        NEW_MASK=launch.new_mask is not None, WINDOW=launch.columns is not None,
        SPLIT=lse is not None, FLOAT32_DOT=INTERPRETED, num_warps=warps(q.dtype), num_stages=STAGES,
    )  # fmt: skip


def reduce(part: Tensor, lse: Tensor, out: Tensor) -> Tensor:
    """Add up the splits of every query into out (B, H, T, Dv)."""
    batch, heads, queries, splits, value_dim = part.shape
    slice_dim = min(max(16, triton.next_power_of_2(value_dim)), 64)
    _reduce_kernel[batch * heads * queries, triton.cdiv(value_dim, slice_dim)](
        part, lse, out, splits, heads, *out.stride()[:3], QUERIES=queries, VALUE_DIM=value_dim,
        BLOCK_S=triton.next_power_of_2(splits), BLOCK_V=slice_dim,
    )  # fmt: skip
    return out


@torch.library.custom_op("plphp::flash_decode", mutates_args=())
def _op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: Tensor,
    scale: float,
    softcap: float | None,
    columns: Tensor | None,
    logical: Tensor,
    window: int,
    new_mask: Tensor | None,
    splits: int | None,
) -> Tensor:
    """`attend` as a custom op: one node of a compiled graph, for any capacity of the buffers."""
    launch = Launch(start, end, scale, softcap, columns, logical, window, new_mask)
    return _launch(q, k, v, launch, splits)


@_op.register_fake
def _op_shape(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    """An empty tensor with the shape and layout of the output, for torch.compile."""
    return empty_output(q, v.shape[-1])
