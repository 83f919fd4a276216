"""Attention of a few new tokens over a layer whose tokens are partly in codes: a Triton kernel.

The kernel of `flash_decode` attends to the tokens that are stored in full, in splits. The kernel
below attends to the tokens in codes, in further splits, and decodes the codes in registers. The
results of all splits are added up, weighted by their log-sum-exp.

A row of codes consists of their bits, the first number in the lowest bits of a byte, and then the
step and the lowest number as float16. For keys a row is 32 tokens of one channel; if the number of
tokens is no multiple of 32, the last rows are shorter. For values a row is one token
(`plphp.recall.codes`).

NOT RUN ON A GPU YET: tested in Triton's interpreter, and compiled for compute capability 8.0, 9.0.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from plphp.attention.flash_decode import (
    INTERPRETED,
    LOWEST,
    add,
    dot,
    launch_splits,
    reduce,
    store,
    tanh,
)
from plphp.attention.launch import (
    Launch,
    empty_output,
    new_parts,
    on_the_queries_device,
    splits_of,
    tile_of,
    warps,
)

STAGES = 3  # a stage takes a quarter of the bytes that it takes with keys stored in full
RANGE = tl.constexpr(4)  # bytes at the end of a row: step and lowest number


class Codes(NamedTuple):
    """The tokens in codes. The fields are arguments of `attend` with the same names.

    keys, values: (B, Hkv, bytes) and (B, Hkv, P, bytes), uint8
    valid: (B, P) bool, None if all tokens count
    columns: (B, Hkv, P) int32, None without a sliding window
    """

    keys: Tensor
    values: Tensor
    tokens: int
    bits: int
    group: int
    valid: Tensor | None
    columns: Tensor | None


@triton.jit(do_not_specialize=["logical", "window", "heads", "splits", "all_splits", "tokens"])
def _codes_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, valid_ptr, columns_ptr,
    scale, softcap, logical, window, heads, splits, all_splits, tokens,
    q_b, q_h, q_t, k_b, k_h, v_b, v_h, o_b, o_h, o_t, o_s, n_b, c_b, c_h,
    Q_D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, VALUE_ROW: tl.constexpr,
    GROUPS: tl.constexpr, QUERIES: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SOFTCAP: tl.constexpr, WINDOW: tl.constexpr, VALID: tl.constexpr, FLOAT32_DOT: tl.constexpr,
):  # fmt: skip
    """One split of one KV head of one row. A step of the loop reads one group of tokens.

    The output and lse are those of `flash_decode._split_kernel` with SPLIT.
    """
    pair, split = tl.program_id(0), tl.program_id(1)
    row, kv_head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    share = tl.cdiv(tl.cdiv(tokens, GROUP), splits)
    low = split * share
    high = tl.minimum(low + share, tl.cdiv(tokens, GROUP))

    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = m < GROUPS * QUERIES
    head, token = kv_head * GROUPS + m // QUERIES, m % QUERIES
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q = tl.load(
        q_ptr + row * q_b + (head * q_h + token * q_t)[:, None] + d[None, :] * Q_D,
        mask=real[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    k_at, v_at = k_ptr + row * k_b + kv_head * k_h, v_ptr + row * v_b + kv_head * v_h
    PER: tl.constexpr = 8 // BITS
    KEY_ROW: tl.constexpr = GROUP // PER + RANGE
    key_byte, value_byte = tl.arange(0, GROUP // PER), tl.arange(0, BLOCK_V // PER)
    whole = tokens // GROUP
    last_row = tl.cdiv(tokens % GROUP, 2 * PER) * 2 + RANGE

    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for group in range(low, high):
        short = group == whole
        length = tl.where(short, last_row, KEY_ROW)
        begin = tl.where(short, DIM * whole * KEY_ROW + d * last_row, (d * whole + group) * KEY_ROW)
        packed = tl.load(
            k_at + begin[:, None] + key_byte[None, :],
            mask=(d < DIM)[:, None] & (key_byte < length - RANGE)[None, :],
            other=0,
        )
        k = _numbers(packed, k_at + begin + length - RANGE, d < DIM, BITS).to(q.dtype)
        logits = dot(q, k, FLOAT32_DOT) * scale
        if SOFTCAP:
            logits = softcap * tanh(logits / softcap)
        n = group * GROUP + tl.arange(0, GROUP)
        inside = n < tokens
        if VALID:
            inside = inside & (tl.load(valid_ptr + row * n_b + n, mask=inside, other=0) != 0)
        visible = inside[None, :]
        if WINDOW:
            column = tl.load(columns_ptr + row * c_b + kv_head * c_h + n, mask=inside, other=0)
            visible = visible & (column[None, :] > (logical - QUERIES + token - window)[:, None])
        at = v_at + n * VALUE_ROW
        packed = tl.load(
            at[:, None] + value_byte[None, :],
            mask=inside[:, None] & (value_byte < VALUE_ROW - RANGE)[None, :],
            other=0,
        )
        v = _numbers(packed, at + VALUE_ROW - RANGE, inside, BITS).to(q.dtype)
        top, mass, total = add(top, mass, total, logits, visible, v, FLOAT32_DOT)

    o_at = out_ptr + row * o_b + (head * o_h + token * o_t)[:, None] + split * o_s + dv[None, :]
    at = lse_ptr + ((row * heads * GROUPS + head) * QUERIES + token) * all_splits + split
    store(o_at, at, top, mass, total, real, (dv < VALUE_DIM)[None, :], True)


@triton.jit
def _numbers(packed, range_ptr, mask, BITS: tl.constexpr):
    """Decode packed (N, M) uint8, whose N ranges are at range_ptr, to (N, M * 8 / BITS) float32."""
    if BITS == 4:
        codes = tl.interleave(packed & 15, packed >> 4)
    else:
        even = tl.interleave(packed & 3, (packed >> 4) & 3)
        codes = tl.interleave(even, tl.interleave((packed >> 2) & 3, packed >> 6))
    at = range_ptr.to(tl.pointer_type(tl.float16))
    step = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    lowest = tl.load(at + 1, mask=mask, other=0.0).to(tl.float32)
    return codes.to(tl.float32) * step[:, None] + lowest[:, None]


@on_the_queries_device
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    end: int,
    codes: tuple[Tensor, Tensor],
    tokens: int,
    bits: int,
    group: int,
    scale: float,
    softcap: float | None = None,
    valid: Tensor | None = None,
    columns: tuple[Tensor, Tensor] | None = None,
    logical: int = 0,
    window: int = 0,
) -> Tensor:
    """Attention output (B, H, T, Dv), in the dtype of q, of the last T columns of k and v.

    q, k, v, start, end, scale, softcap, logical, window: as in `flash_decode.attend`
    codes: of the keys (B, Hkv, bytes) and values (B, Hkv, P, bytes) of P tokens, uint8, contiguous
        except along B and Hkv
    tokens: P
    bits: 4 or 2, of a number
    group: how many tokens of a channel of keys share a range
    valid: (B, P) bool, the tokens in codes that count; by default all
    columns: (B, Hkv, C) and (B, Hkv, P) int32, the columns of the slots and of the tokens in codes;
        without them there is no sliding window
    """
    block = tile_of(q, k.shape[1], v.shape[3])
    full_splits = splits_of(q, k.shape[1], block, triton.cdiv(k.shape[2], block.keys))
    code_splits = splits_of(q, k.shape[1], block, triton.cdiv(tokens, group))
    part, lse = new_parts(q, full_splits + code_splits, v.shape[3])
    slot_columns, code_columns = (None, None) if columns is None else columns
    launch = Launch(start, end, scale, softcap, slot_columns, logical, window, None)
    launch_splits(q, k, v, launch, part[..., :full_splits, :], lse[..., :full_splits])
    parked = Codes(*codes, tokens, bits, group, valid, code_columns)
    _launch_codes(q, parked, launch, part[..., full_splits:, :], lse[..., full_splits:])
    return reduce(part, lse, empty_output(q, v.shape[3]))


def _launch_codes(q: Tensor, codes: Codes, launch: Launch, part: Tensor, lse: Tensor) -> None:
    """Launch the kernel for the tokens in codes.

    It writes part (B, H, T, splits, Dv) and lse (B, H, T, splits).
    """
    batch, heads, queries, dim = q.shape
    kv_heads, value_dim, splits = codes.keys.shape[1], part.shape[4], part.shape[3]
    block, groups = tile_of(q, kv_heads, value_dim), heads // kv_heads
    # The kernel does not read `valid` without fillers or `columns` without a window. It is given
    # the pointer of another tensor then.
    valid = codes.keys if codes.valid is None else codes.valid
    columns = codes.keys if codes.columns is None else codes.columns
    _codes_kernel[batch * kv_heads, splits, triton.cdiv(groups * queries, block.rows)](
        q, codes.keys, codes.values, part, lse, valid, columns,
        launch.scale, launch.softcap or 0.0, launch.logical, launch.window,
        kv_heads, splits, lse.stride(2), codes.tokens,
        *q.stride()[:3], *codes.keys.stride()[:2], *codes.values.stride()[:2], *part.stride()[:4],
        valid.stride(0), *columns.stride()[:2],
        Q_D=q.stride(3), BITS=codes.bits, GROUP=codes.group, VALUE_ROW=codes.values.shape[3],
        GROUPS=groups, QUERIES=queries, DIM=dim, VALUE_DIM=value_dim,
        BLOCK_M=block.rows, BLOCK_D=block.dim, BLOCK_V=block.value_dim,
        SOFTCAP=launch.softcap is not None, WINDOW=codes.columns is not None,
        VALID=codes.valid is not None, FLOAT32_DOT=INTERPRETED,
        num_warps=warps(q.dtype), num_stages=STAGES,
    )  # fmt: skip
