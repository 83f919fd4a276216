"""Checks the `vision_mask` that a caller gives if plphp cannot find the vision tokens."""

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
    """The `vision_mask` of `plphp.prune`: a function as it is, anything else as spans (B, N).

    Raises InputTypeError (a TypeError) for a wrong type, and InputError (a ValueError) for a wrong
    shape or number.
    """
    if given is None or (callable(given) and not isinstance(given, Tensor)):
        return given  # type: ignore[no-any-return]
    return as_spans(given)


def as_spans(given: Any) -> Tensor:
    """Spans (B, N) int64 from a tensor, an array or nested lists. Raises as `checked_mask`."""
    try:
        spans = torch.as_tensor(given)
    except ValueError as error:
        raise InputError(f"{WANTED}; got a {type(given).__name__}: {error}") from error
    except Exception as error:  # reading a foreign type may raise any exception
        raise InputTypeError(f"{WANTED}; got {_named(given)}") from error
    if spans.is_floating_point() or spans.is_complex():
        raise InputTypeError(f"{WANTED}; got {spans.dtype}")
    if spans.dim() != 2:
        raise InputError(f"{WANTED}; got the shape {tuple(spans.shape)}")
    spans = spans.long()
    if spans.numel() and (lowest := int(spans.min())) < -1:
        raise InputError(f"{WANTED}; got the number {lowest}")
    return spans


def mask_columns(mask: Mask, input_ids: Tensor | None, begin: int, length: int) -> Tensor:
    """Spans (B, length) int64 of the prompt with the columns [begin, begin + length).

    mask: covers these columns only, or the whole conversation
    Raises as `checked_mask`, and InputError for another length or image numbers above `length`.
    """
    spans = as_spans(mask(input_ids)) if callable(mask) else as_spans(mask)
    if spans.shape[1] not in (length, begin + length):
        whole = f" or {begin + length}, with earlier turns," if begin else ""
        raise InputError(
            f"vision_mask must be (B, N) with N = {length}{whole} for this prompt, got the shape "
            f"{tuple(spans.shape)}; for prompts of different lengths give a function from input_ids"
        )
    spans = spans[:, -length:]
    if (highest := int(spans.max())) > length:
        raise InputError(
            f"vision_mask numbers an image {highest}: number them 1, 2, ... in every row"
        )
    return spans


def _named(given: Any) -> str:
    """How a message names a value: text and None as they are, others by their type."""
    return repr(given) if isinstance(given, str) or given is None else type(given).__name__
