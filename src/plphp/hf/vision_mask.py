"""The vision mask that a caller gives where the vision tokens cannot be found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from plphp.errors import InputError, InputTypeError

Mask = Tensor | Callable[..., Tensor] | None

WANTED = (
    "vision_mask must hold integers (B, N), 0 for text, i > 0 for the i-th image or video of the "
    "row, -1 for padding, as plphp.vision_spans returns them; or be a function from input_ids to "
    "such a tensor"
)


def checked_mask(given: Any) -> Mask:
    """What `prune` was given, checked as far as it can be before there is a prompt.

    Raises InputTypeError, a TypeError, or InputError, a ValueError.
    """
    if given is None or (callable(given) and not isinstance(given, Tensor)):
        return given  # type: ignore[no-any-return]
    return as_spans(given)


def as_spans(given: Any) -> Tensor:
    """(B, N) int64 of a tensor, an array or nested lists. Raises as `checked_mask`."""
    try:
        spans = torch.as_tensor(given)
    except ValueError as error:
        raise InputError(f"{WANTED}; got a {type(given).__name__}: {error}") from error
    except Exception as error:  # whatever reading a foreign type raises
        raise InputTypeError(f"{WANTED}; got {_named(given)}") from error
    if spans.is_floating_point() or spans.is_complex():
        raise InputTypeError(f"{WANTED}; got {spans.dtype}")
    if spans.dim() != 2:
        raise InputError(f"{WANTED}; got the shape {tuple(spans.shape)}")
    spans = spans.long()
    if spans.numel() and (least := int(spans.min())) < -1:
        raise InputError(f"{WANTED}; got the number {least}")
    return spans


def mask_columns(mask: Mask, input_ids: Tensor | None, begin: int, length: int) -> Tensor:
    """(B, length) int64: what a mask says of the prompt that adds columns `begin` and later.

    A mask covers those columns, or the whole conversation. Raises as `checked_mask`.
    """
    spans = as_spans(mask(input_ids)) if callable(mask) else as_spans(mask)
    if spans.shape[1] not in (length, begin + length):
        whole = f" or {begin + length}, with earlier turns," if begin else ""
        raise InputError(
            f"vision_mask must be (B, N) with N = {length}{whole} for this prompt, got the shape "
            f"{tuple(spans.shape)}; for prompts of different lengths give a function from input_ids"
        )
    own = spans[:, -length:]
    if (most := int(own.max())) > length:
        raise InputError(f"vision_mask numbers an image {most}: number them 1, 2, ... in every row")
    return own


def _named(given: Any) -> str:
    return repr(given) if isinstance(given, str) or given is None else type(given).__name__
