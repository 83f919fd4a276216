"""Which implementation attends: the one place where that is decided.

On the CPU and for prompts it is PyTorch's scaled_dot_product_attention (SDPA); for a few new tokens
on CUDA the Triton kernel where the table below says so; the formula itself where neither applies.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from plphp.attention import coded, reference, sdpa

HAS_TRITON = find_spec("triton") is not None

# From how many slots a decode step takes the Triton kernel, None for never, by what SDPA would be
# asked for. NOT MEASURED ON A GPU YET; a measurement replaces it. What it rests on: PyTorch's flash
# kernel splits along the keys too, but takes no mask; those that do neither split nor skip hidden
# slots, and rows of different lengths or static buffers cannot do without one. Soft-capping, which
# SDPA does not know, counts as a mask.
KERNEL_FROM: dict[str, int | None] = {"plain": None, "masked": 0}
MOST_QUERIES = 16  # more new tokens than that are a prompt: matrix products, not bytes, decide


class Held(Protocol):
    """What attention reads of a layer: `plphp.cache.KVStore` or `StaticStore` say what it means."""

    keys: Tensor
    values: Tensor
    start: Tensor
    positions: Tensor | None
    window: int | None
    ragged: bool

    @property
    def end(self) -> int | Tensor: ...
    @property
    def logical(self) -> int | Tensor: ...
    def held(self) -> tuple[Tensor, Tensor]: ...
    def visible(self, queries: int) -> Tensor | None: ...


class Parked(Protocol):
    """What lies in codes beside it: `plphp.recall.QuantisedHome` says what it means."""

    @property
    def keys(self) -> coded.Keys: ...
    @property
    def values(self) -> coded.Values: ...

    valid: Tensor | None
    columns: Tensor | None

    def visible(self, store: Any, queries: int) -> Tensor | None: ...


def decode_attention(
    q: Tensor,
    held: Held,
    scale: float,
    softcap: float | None = None,
    among: Tensor | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv) of the T columns that were appended last to a layer.

    q (B, H, T, D). among: (B or 1, 1, T, T) bool, what these columns see of each other, by default
    each all before it.
    """
    window = _window(held)
    masked = held.ragged or q.shape[2] > 1 or window is not None or softcap is not None
    if (
        has_kernel(q.device)
        and kernel_takes(q, held.keys, held.values)
        and kernel_wins(q.shape[2], held.keys.shape[2], masked)
    ):
        from plphp.attention import flash_decode  # needs Triton

        return flash_decode.attend(
            q, held.keys, held.values, held.start, held.end, scale, softcap,
            None if window is None else held.positions, held.logical, window or 0, among,
        )  # fmt: skip
    visible = held.visible(q.shape[2])
    if among is not None and visible is not None:
        visible = side_by_side(visible[..., : -among.shape[-1]], among)
    return attend(q, *held.held(), visible, scale, softcap)


def coded_attention(
    q: Tensor, held: Held, parked: Parked, scale: float, softcap: float | None = None
) -> Tensor:
    """As `decode_attention`, over what a layer holds and what is parked beside it in codes."""
    if (
        has_kernel(q.device)
        and kernel_takes(q, held.keys, held.values)
        and q.shape[2] <= MOST_QUERIES
    ):
        from plphp.attention import flash_codes  # needs Triton

        assert isinstance(held.end, int) and isinstance(held.logical, int)  # nothing static parks
        window, columns = _window(held), None
        if window is not None and held.positions is not None and parked.columns is not None:
            columns = (held.positions, parked.columns)
        return flash_codes.attend(
            q, held.keys, held.values, held.start, held.end,
            (parked.keys.packed, parked.values.packed), parked.keys.tokens, parked.keys.bits,
            parked.keys.group, scale, softcap, parked.valid, columns, held.logical, window or 0,
        )  # fmt: skip
    visible = parked.visible(held, q.shape[2])
    return coded.attend(q, *held.held(), (parked.keys, parked.values), visible, scale, softcap)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """One mask (B, Hkv, T, S + S') of two, (B or 1, Hkv or 1, T, S) and (..., S')."""
    lead = [max(sizes) for sizes in zip(left.shape[:2], right.shape[:2], strict=True)]
    return torch.cat([part.expand(*lead, -1, -1) for part in (left, right)], -1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv) of new tokens over a pruned cache; see `reference.attend`."""
    if softcap is not None:  # SDPA has no soft-capping
        return reference.attend(q, k, v, visible, scale, softcap)
    return sdpa.attend(q, k, v, visible, scale)


def kernel_wins(queries: int, slots: int, masked: bool) -> bool:
    """Whether the Triton kernel is to be taken where it can be: T new tokens over so many slots."""
    least = KERNEL_FROM["masked" if masked else "plain"]
    return queries <= MOST_QUERIES and least is not None and slots >= least


def kernel_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernel can compute these: dtypes, head sizes, no gradient, addresses."""
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and max(q.shape[-1], v.shape[-1]) <= 256
        and not (torch.is_grad_enabled() and q.requires_grad)
        and k.shape[2] * max(k.stride(2), v.stride(2)) < 2**31  # its slot offsets have 32 bits
    )


def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel runs on a device."""
    if not HAS_TRITON or device.type != "cuda" or torch.version.cuda is None:
        return False
    # Older ones have neither bfloat16 products nor asynchronous copies.
    return torch.cuda.get_device_properties(device).major >= 8


def _window(held: Held) -> int | None:
    """The sliding window, where something may have left it."""
    logical = held.logical
    if held.positions is None or held.window is None:
        return None
    return None if isinstance(logical, int) and logical <= held.window else held.window
