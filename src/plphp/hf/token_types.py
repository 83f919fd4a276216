"""Token types that a call leaves out: which columns are vision tokens, for the model itself.

Qwen-VL and GLM-V compute positions from them, Gemma 3 and 4 masks. Without them transformers treats
vision tokens as text and says nothing. A first turn is left as the caller has given it, with a note
in its report. In a later turn, for which no processor makes them, they are read from the ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn import functional

from plphp.errors import InputError, UnsupportedModeError
from plphp.hf.later_turn import PAGE, PIXELS
from plphp.models import FAMILIES
from plphp.models.families import GENERIC
from plphp.models.spans import IMAGE, VIDEO, columns_of_kind

MASKS = "token_type_ids"  # under this name they make masks
# Earlier versions of transformers take the types of a later turn from the wrong columns.
MASKS_FROM = Version("5.23")
NOTE = (
    "{} was not given, so that this model treats vision tokens as text: pass all that the "
    "processor returns"
)


def types_name(model: Any) -> str | None:
    """The name of the token types that a model's forward takes, None if it takes none."""
    name = FAMILIES.get(model.config.model_type, GENERIC).types
    return name if name in inspect.signature(type(model).forward).parameters else None


def missing_types(
    model: Any, source: Mapping[str, Any], begin: int, length: int
) -> dict[str, Tensor]:
    """The token types of a later turn, by their name, if the call has left them out.

    They are (B, begin + length) int64. If the call has the ids of its new columns only, earlier
    columns count as text, to which all columns attend anyway.

    source: the arguments of the call, by name
    begin, length: the columns that the cache has read, and those that the turn adds

    Returns nothing for a first turn and for a call without pixels. Raises InputError if the ids do
    not tell images from videos, and UnsupportedModeError if transformers is too old for masks of
    later turns.
    """
    name, ids = types_name(model), source.get("input_ids")
    given = [pixels for pixels in PIXELS if isinstance(source.get(pixels), Tensor)]
    if not begin or name is None or not given:
        return {}
    if name == MASKS and Version(transformers.__version__) < MASKS_FROM:
        raise UnsupportedModeError(
            f"transformers {transformers.__version__} gives the images of a later turn wrong masks "
            f"in this model: install transformers {MASKS_FROM} or newer, or pass all images in "
            "the first turn of a new conversation"
        )
    if source.get(name) is not None or ids is None:
        return {}
    types = torch.zeros_like(ids, dtype=torch.int64)
    for kind in (IMAGE, VIDEO):
        columns = columns_of_kind(model.config, ids, None, kind)
        if columns is not None:
            types = types.masked_fill(columns.to(ids.device), kind)
    for pixels in given:
        if not bool((types == PIXELS[pixels][0]).any()):
            raise InputError(
                f"the ids do not tell which tokens {pixels} belongs to: pass {name} of the whole "
                f"conversation, with 0 for the tokens of answers; see {PAGE}"
            )
    return {name: functional.pad(types, (begin + length - types.shape[1], 0))}


def types_note(model: Any, source: Mapping[str, Any], begin: int) -> list[str]:
    """A note if the first turn has pixels and ids, and lacks the token types; else no note."""
    name = types_name(model)
    pixels = any(isinstance(source.get(one), Tensor) for one in PIXELS)
    if begin or name is None or not pixels or source.get(name) is not None:
        return []
    return [] if source.get("input_ids") is None else [NOTE.format(name)]
