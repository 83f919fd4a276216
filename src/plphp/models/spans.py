"""Spans: the code of each column of a prompt, which says to which image its token belongs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise, repeat
from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedModelError
from plphp.models.families import FAMILIES, GENERIC, Family
from plphp.models.layouts import Run
from plphp.models.sizes import NEEDED, Inputs
from plphp.policy.view import PADDING

IMAGE, VIDEO = 1, 2  # codes of mm_token_type_ids
DEEPEST = 4  # configs inside configs
FRAMES = (
    "adjacent images of one size may be frames of a video, which this family marks as images: each "
    "counts as an image of its own unless vision_mask=... says otherwise"
)


def vision_spans(
    config: Any,
    input_ids: Tensor | None = None,
    *,
    attention_mask: Tensor | None = None,
    mm_token_type_ids: Tensor | None = None,
    **inputs: Any,
) -> Tensor:
    """Spans (B, N) int64 of a prompt: 0 text, i > 0 the row's i-th image or video, -1 padding.

    config: the model's config
    input_ids: (B, N) int64
    attention_mask: (B, N), 0 for padding
    mm_token_type_ids: (B, N) int64, from the processor
    inputs: the other outputs of the processor (image_grid_thw, image_sizes, ...). They separate
        adjacent images

    The vision tokens are those of mm_token_type_ids, or, without it, those with the config's image
    and video token ids. Raises UnsupportedModelError where neither is given.
    """
    return find_spans(config, input_ids, attention_mask, mm_token_type_ids, inputs)[0]


def find_spans(
    config: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    mm_token_type_ids: Tensor | None,
    inputs: Inputs,
) -> tuple[Tensor, tuple[str, ...]]:
    """The spans of `vision_spans`, and notes on images that could not be told apart."""
    kinds = _kinds(config, input_ids, mm_token_type_ids)
    if attention_mask is not None:
        kinds = kinds.masked_fill(attention_mask == 0, PADDING)
    rows: list[list[int]] = kinds.tolist()
    family = FAMILIES.get(config.model_type, GENERIC)
    spans = torch.where(kinds == PADDING, PADDING, torch.zeros_like(kinds)).cpu()
    notes: list[str] = []
    ids: list[list[int]] | None = None if input_ids is None else input_ids.tolist()
    found = [_images(family, config, inputs, rows, ids, kind, notes) for kind in (IMAGE, VIDEO)]
    for row, images in enumerate(zip(*found, strict=True)):
        # Images and videos are numbered together, in the order in which they appear.
        for number, pieces in enumerate(sorted(images[0] + images[1]), start=1):
            for start, stop in pieces:
                spans[row, start:stop] = number
    return spans.to(kinds.device), tuple(notes)


NAMES = {
    IMAGE: ("image_token_id", "image_token_index", "image_patch_id", "img_context_token_id"),
    VIDEO: ("video_token_id", "video_token_index"),
}


def vision_token_ids(config: Any) -> dict[int, int]:
    """The config's image and video token ids. Maps a token id to IMAGE or VIDEO.

    What the config does not name itself is looked up in its sub-configs, the outer ones first.
    """
    found: dict[int, int] = {}
    for kind, keys in NAMES.items():
        for level in _levels(config):
            named = [value for part in level for key in keys if _is_id(value := _get(part, key))]
            if named:
                found |= {value: kind for value in named if value not in found}
                break
    return found


def _levels(config: Any) -> Iterator[list[Any]]:
    """The config, then the configs inside it, then those inside these."""
    level = [config]
    for _ in range(DEEPEST):
        yield level
        level = [inner for part in level for inner in _parts(part) if _is_config(inner)]


def _parts(config: Any) -> list[Any]:
    return list((config if isinstance(config, Mapping) else vars(config)).values())


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "model_type")


def _get(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kinds(config: Any, input_ids: Tensor | None, mm_token_type_ids: Tensor | None) -> Tensor:
    """The kind of each column, (B, N) int64: 0 text, IMAGE or VIDEO.

    The placeholder ids of the config say which columns are vision, and mm_token_type_ids whether
    they belong to an image or a video. Token types alone do not suffice where ids are given: some
    processors give start, end and tile tokens the type of an image too, or give no type.
    """
    by_id = _kinds_by_id(config, input_ids)
    if mm_token_type_ids is None:
        if by_id is not None:
            return by_id
        what = "input_ids" if vision_token_ids(config) else "an image_token_id in the config"
        raise UnsupportedModelError(
            f"cannot tell which tokens of {config.model_type!r} are vision tokens: no "
            f"mm_token_type_ids and no {what}. Pass plphp.prune(model, vision_mask=...), "
            "coded as plphp.vision_spans returns it."
        )
    types = mm_token_type_ids.long()
    types = torch.where((types == IMAGE) | (types == VIDEO), types, 0)  # audio counts as text
    if by_id is None or not bool((by_id > 0).any()):
        return types
    return torch.where((by_id > 0) & (types > 0), types, by_id)


def columns_of_kind(
    config: Any, input_ids: Tensor | None, mm_token_type_ids: Tensor | None, kind: int
) -> Tensor | None:
    """(B, N) bool on the CPU: the columns of images or videos; None where nothing tells them."""
    if mm_token_type_ids is None and (input_ids is None or not vision_token_ids(config)):
        return None
    return (_kinds(config, input_ids, mm_token_type_ids) == kind).cpu()


def _kinds_by_id(config: Any, input_ids: Tensor | None) -> Tensor | None:
    """Kinds (B, N) by the config's token ids; None without token ids in the config or input_ids."""
    names = vision_token_ids(config)
    if input_ids is None or not names:
        return None
    kinds = torch.zeros_like(input_ids, dtype=torch.int64)
    for token, kind in names.items():
        kinds = kinds.masked_fill(input_ids == token, kind)
    return kinds


def _images(
    family: Family,
    config: Any,
    inputs: Inputs,
    rows: list[list[int]],
    ids: list[list[int]] | None,
    kind: int,
    notes: list[str],
) -> list[list[list[Run]]]:
    """The images of one kind in each row; an image is a list of runs. Adds to `notes`."""
    runs = [_runs(row, kind) for row in rows]
    if not any(runs):
        return [[] for _ in rows]
    counts = (family.images if kind == IMAGE else family.videos)(config, inputs)
    if counts is not None:
        assigned = _assign_runs(runs, counts)
        if assigned is not None:
            return assigned
        name = "images" if kind == IMAGE else "videos"
        notes.append(f"{name} were told apart by the text between them only")
    each = [None] * len(rows) if ids is None else ids
    images = [family.layout(row, own) for row, own in zip(runs, each, strict=True)]
    if family.frames and any(map(_may_be_frames, images)):
        notes.append(FRAMES)
    return images


def _may_be_frames(images: list[list[Run]]) -> bool:
    """Whether two adjacent images are single runs of one length, as the frames of a video are."""
    sizes = [sum(stop - start for start, stop in image) * (len(image) == 1) for image in images]
    return any(a == b > 0 for a, b in pairwise(sizes))


def _runs(row: list[int], kind: int) -> list[Run]:
    """The unbroken runs of columns of one kind in a row."""
    runs: list[Run] = []
    for column, value in enumerate(row):
        if value != kind:
            continue
        if runs and runs[-1][1] == column:
            runs[-1] = (runs[-1][0], column + 1)
        else:
            runs.append((column, column + 1))
    return runs


def _assign_runs(runs: list[list[Run]], counts: list[int] | int) -> list[list[list[Run]]] | None:
    """Assign runs to images of known sizes: adjacent images are split, interrupted ones joined.

    runs: per row; counts: tokens of each image, or of all images. Returns None where the sizes do
    not add up to the lengths of the runs.
    """
    tokens = sum(stop - start for row in runs for start, stop in row)
    sizes = repeat(counts) if isinstance(counts, int) else iter(_last_sizes(counts, tokens))
    images: list[list[list[Run]]] = []
    for row in runs:
        images.append([])
        missing = 0
        for start, stop in row:
            while start < stop:
                if missing == 0:
                    missing = next(sizes, 0)
                    images[-1].append([])
                if missing == 0:
                    return None
                taken = min(missing, stop - start)
                images[-1][-1].append((start, start + taken))
                start, missing = start + taken, missing - taken
        if missing:
            return None
    return images


def _last_sizes(sizes: list[int], tokens: int) -> list[int]:
    """The last sizes that add up to `tokens`, because a later turn may repeat earlier images."""
    first = len(sizes)
    while first and tokens > 0:
        first -= 1
        tokens -= sizes[first]
    return sizes[first:]


def describes_vision(config: Any) -> bool:
    """Whether the config has an image or video token id."""
    return bool(vision_token_ids(config))


def processor_inputs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model call that `find_spans` reads to separate images."""
    return {name: kwargs[name] for name in NEEDED if kwargs.get(name) is not None}
