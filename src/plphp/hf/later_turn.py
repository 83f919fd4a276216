"""Checks that a later turn continues the conversation of its cache, and brings new pixels only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.models import FAMILIES, processor_inputs
from plphp.models.families import GENERIC
from plphp.models.spans import IMAGE, VIDEO, columns_of_kind

PAGE = "docs/your-model.md#a-second-question"
# What generate() takes beside the ids: of which kind it is, and the sizes that belong to it.
PIXELS = {
    "pixel_values": (IMAGE, "image_grid_thw"),
    "pixel_values_images": (IMAGE, "image_grid_thw"),
    "pixel_values_videos": (VIDEO, "video_grid_thw"),
}


@dataclass
class History:
    """The token ids of a conversation, as far as they are known. Its cache may hold more columns.

    asked: (B, C) int64, the ids that a call was given last, with those of earlier turns, or None
    said: (B, C') int64, what generate() returned for them, or None
    """

    asked: Tensor | None = None
    said: Tensor | None = None

    def begin(self, source: Mapping[str, Any], config: Any, begin: int, length: int) -> None:
        """Note a prompt of the columns [begin, begin + length).

        source: the arguments of the call; config: of the whole model
        Raises InputError for a later turn whose pixels or whose history cannot be right.
        """
        ids = source.get("input_ids")
        whole = ids if isinstance(ids, Tensor) and ids.shape[1:] == (begin + length,) else None
        if begin and whole is not None:
            self._check(whole, begin, source.get("attention_mask"))
        if begin:
            _check_lengths(source, begin + length)
            _check_pixels(source, config, length)
        self.cut(begin)
        if whole is not None:
            self.asked, self.said = whole, None

    def end(self, returned: Any, columns: int) -> None:
        """Note what generate() returned, of which the cache has read `columns` columns."""
        said = getattr(returned, "sequences", returned)
        self.said = said[:, :columns] if isinstance(said, Tensor) and said.dim() == 2 else None

    def cut(self, columns: int) -> None:
        """Forget the ids after the first `columns` columns."""
        self.asked = None if self.asked is None else self.asked[:, :columns]
        self.said = None if self.said is None else self.said[:, :columns]

    def forget(self) -> None:
        """Forget all ids, as the rows of the cache are others now."""
        self.asked = self.said = None

    def _known(self) -> Tensor | None:
        """The longest ids (B, C) whose rows are those of the cache."""
        asked, said = self.asked, self.said
        if asked is None or said is None or len(said) != len(asked):
            return asked
        columns = min(asked.shape[1], said.shape[1])
        same = torch.equal(said[:, :columns].to(asked.device), asked[:, :columns])
        return said if same and said.shape[1] > columns else asked

    def _check(self, ids: Tensor, begin: int, mask: Any) -> None:
        """Raise InputError if the ids (B, C) of a whole conversation are not those of the cache.

        begin: the columns that the cache has read; mask: of the call, (B, C) or None
        """
        known = self._known()
        if known is None or len(ids) != len(known):
            return
        columns = min(begin, known.shape[1])
        differ = ids[:, :columns] != known[:, :columns].to(ids.device)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            differ &= mask[:, :columns].to(ids.device) != 0  # the id of padding says nothing
        if differ.any():
            row, column = differ.nonzero()[0].tolist()
            raise InputError(
                f"this prompt does not continue the conversation of its cache: row {row} has "
                f"another token in column {column} of the {begin} that were read. Pass the ids "
                "that generate() returned and then the new ones, or start a new "
                f"plphp.PrunedCache; see {PAGE}"
            )


def _check_lengths(source: Mapping[str, Any], whole: int) -> None:
    """Raise InputError if a 2D mask or token types do not have the columns of the conversation.

    whole: the columns of the conversation with its new turn. Token types may also be those of the
        ids, where only the new columns were passed
    """
    ids = source.get("input_ids")
    given = whole if ids is None else ids.shape[-1]
    for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
        tensor = source.get(name)
        if not isinstance(tensor, Tensor) or tensor.dim() != 2:
            continue
        if tensor.shape[1] not in ((whole,) if name == "attention_mask" else (given, whole)):
            what = "1 for each token" if name == "attention_mask" else "0 for text, or none of it"
            raise InputError(
                f"{name} has {tensor.shape[1]} columns, and input_ids {given}: pass that of the "
                f"whole conversation, with {what}; see {PAGE}"
            )


def _check_pixels(source: Mapping[str, Any], config: Any, length: int) -> None:
    """Raise InputError if a call brings pixels of images that are not in its last columns.

    length: the number of new columns
    """
    ids, types = source.get("input_ids"), source.get("mm_token_type_ids")
    if ids is not None and types is not None:
        types = types[:, -ids.shape[1] :]
    for name, (kind, sizes) in PIXELS.items():
        if not isinstance(source.get(name), Tensor):
            continue
        marked = columns_of_kind(config, ids, types, kind)
        if marked is None or not marked.any():
            continue  # only the model knows where these pixels belong
        new, every = int(marked[:, -length:].sum()), int(marked.sum())
        if new and (new == every or _features(source, config, name, kind, sizes) != every):
            continue
        what = "images" if kind == IMAGE else "videos"
        raise InputError(
            f"{name} holds {what} of earlier turns, which the cache has read already: pass what "
            f"this turn brings new only, or leave {name} and its sizes ({sizes}, image_sizes) out "
            f"if that is nothing; see {PAGE}"
        )


def _features(
    source: Mapping[str, Any], config: Any, name: str, kind: int, sizes: str
) -> int | None:
    """The number of vision tokens that pixels make; None if it cannot be told."""
    pixels, grid = source[name], source.get(sizes)
    family = FAMILIES.get(config.model_type, GENERIC)
    if isinstance(grid, Tensor) and int(grid.prod(-1).sum()) != len(pixels):
        return None  # the sizes are of the whole conversation, the pixels are not
    inputs = processor_inputs(source)
    counts = (family.images if kind == IMAGE else family.videos)(config, inputs)
    if isinstance(counts, int):
        return counts * len(pixels)
    return None if counts is None else sum(counts)
