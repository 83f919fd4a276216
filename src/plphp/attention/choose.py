"""Selects the implementation of attention over a pruned layer.

On the CPU, and for prompts, it is PyTorch's scaled_dot_product_attention (SDPA). For a few new
tokens on CUDA it is the Triton kernel, where `tuned.KERNEL_FROM` says so. It is the formula in
`reference` where neither can be used.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from plphp.attention import coded, reference, sdpa
from plphp.attention.tuned import KERNEL_FROM

HAS_TRITON = find_spec("triton") is not None

# With more new tokens the time depends on the matrix products and not on the bytes read, so SDPA is
# used, as for a prompt.
MOST_QUERIES = 16


class Held(Protocol):
    """The store of a layer, as attention reads it; see `plphp.cache.KVStore` and `StaticStore`."""

    keys: Tensor
    values: Tensor
    start: Tensor
    columns: Tensor | None
    window: int | None
    ragged: bool
    skips: bool

    @property
    def end(self) -> int | Tensor: ...
    @property
    def logical(self) -> int | Tensor: ...
    def held(self) -> tuple[Tensor, Tensor]: ...
    def visible(self, queries: int) -> Tensor | None: ...


class Parked(Protocol):
    """The home of tokens that are parked in codes; see `plphp.recall.QuantisedHome`."""

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
    new_mask: Tensor | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv) of the last T columns that were appended to a layer.

    q: (B, H, T, D)
    held: the store of the layer
    scale: factor of the logits
    softcap: logits x become softcap * tanh(x / softcap); None for no soft cap
    new_mask: (B or 1, 1, T, T) bool, which of these T columns attend to which of them; by default
        each attends to itself and those before it
    """
    window = _window(held)
    masked = held.ragged or q.shape[2] > 1 or window is not None or softcap is not None
    if (
        has_kernel(q.device)
        and not held.skips  # the kernel counts columns back from the last one
        and kernel_takes(q, held.keys, held.values)
        and kernel_wins(q.shape[2], held.keys.shape[2], masked)
    ):
        from plphp.attention import flash_decode  # needs Triton

        return flash_decode.attend(
            q, held.keys, held.values, held.start, held.end, scale, softcap,
            None if window is None else held.columns, held.logical, window or 0, new_mask,
        )  # fmt: skip
    visible = held.visible(q.shape[2])
    if new_mask is not None and visible is not None:
        visible = side_by_side(visible[..., : -new_mask.shape[-1]], new_mask)
    return attend(q, *held.held(), visible, scale, softcap)


def coded_attention(
    q: Tensor, held: Held, parked: Parked, scale: float, softcap: float | None = None
) -> Tensor:
    """As `decode_attention`, over a store and the tokens of the same layer that are in codes."""
    if (
        has_kernel(q.device)
        and kernel_takes(q, held.keys, held.values)
        and q.shape[2] <= MOST_QUERIES
    ):
        from plphp.attention import flash_codes  # needs Triton

        assert isinstance(held.end, int) and isinstance(
            held.logical, int
        )  # a static cache has no recall
        window, columns = _window(held), None
        if window is not None and held.columns is not None and parked.columns is not None:
            columns = (held.columns, parked.columns)
        return flash_codes.attend(
            q, held.keys, held.values, held.start, held.end,
            (parked.keys.packed, parked.values.packed), parked.keys.tokens, parked.keys.bits,
            parked.keys.group, scale, softcap, parked.valid, columns, held.logical, window or 0,
        )  # fmt: skip
    visible = parked.visible(held, q.shape[2])
    return coded.attend(q, *held.held(), (parked.keys, parked.values), visible, scale, softcap)


def side_by_side(left: Tensor, right: Tensor) -> Tensor:
    """Join two masks, (B or 1, Hkv or 1, T, S) and (..., S'), to one with S + S' slots."""
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
    """Attention output (B, H, T, Dv) of new tokens; arguments as in `reference.attend`."""
    if softcap is not None:  # SDPA has no soft-capping
        return reference.attend(q, k, v, visible, scale, softcap)
    return sdpa.attend(q, k, v, visible, scale)


def kernel_wins(queries: int, slots: int, masked: bool) -> bool:
    """Whether the Triton kernel is used if it can be.

    queries: number of new tokens; slots: capacity of the buffers; masked: as in KERNEL_FROM
    """
    threshold = KERNEL_FROM["masked" if masked else "plain"]
    return queries <= MOST_QUERIES and threshold is not None and slots >= threshold


def kernel_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernel supports these dtypes and sizes; it cannot compute a gradient.

    q: (B, H, T, D); k: (B, Hkv, C, D); v: (B, Hkv, C, Dv)
    """
    return (
        q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and max(q.shape[-1], v.shape[-1]) <= 256
        and not (torch.is_grad_enabled() and q.requires_grad)
        and k.shape[2] * max(k.stride(2), v.stride(2)) < 2**31  # the kernel's offsets have 32 bits
    )


def has_kernel(device: torch.device) -> bool:
    """Whether the Triton kernel can run on a device: CUDA with compute capability 8.0 or newer."""
    if not HAS_TRITON or device.type != "cuda" or torch.version.cuda is None:
        return False
    # Older GPUs have neither bfloat16 products nor asynchronous copies.
    return torch.cuda.get_device_properties(device).major >= 8


def _window(held: Held) -> int | None:
    """The size of the sliding window; None if every column is inside it, or without a window."""
    logical = held.logical
    if held.columns is None or held.window is None:
        return None
    return None if isinstance(logical, int) and logical <= held.window else held.window
