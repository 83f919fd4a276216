"""The number of vision tokens that an image will have, from a processor or a config."""

from __future__ import annotations

from typing import Any

import torch

from plphp.models.families import FAMILIES, GENERIC
from plphp.models.sizes import Inputs

ASSUMED = 1024  # vision tokens of an image, if neither the processor nor the config gives them
SIDE = 1024  # pixels per side of the image, if the number depends on the size of the image
# The attributes of configs that give the number of tokens of every image
NAMES = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "image_seq_length")
INNER_NAMES = ("num_image_tokens",)
PICTURE = f"for a picture of {SIDE} x {SIDE} pixels"
UNCUT = "for a picture that its processor does not cut into tiles"
PROCESSOR, CONFIG = "from its processor", "from its config"


def image_tokens(config: Any, processor: Any = None) -> tuple[int, str]:
    """The number of vision tokens of an image, and the source of that number in words.

    processor: the model's processor, which knows how images are scaled and tiled, or None

    Without a number from the processor, the rule of the model family gives it, and then an
    attribute of the config. If none of them does, the number is ASSUMED.
    """
    if processor is not None and (count := _of_processor(processor)):
        return count, f"{PROCESSOR}, {PICTURE}"
    family = FAMILIES.get(getattr(config, "model_type", ""), GENERIC)
    picture = _picture(config)
    for inputs, words in (({}, CONFIG), (picture, f"{CONFIG}, {PICTURE}")):
        try:
            counted = family.images(config, inputs)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        first = counted[0] if isinstance(counted, list) and counted else counted
        if isinstance(first, int) and first > 0:
            return first, words
    if count := _named(config):
        return count, f"{CONFIG}, {UNCUT}"
    if "image_grid_thw" in picture:
        merge = int(config.vision_config.spatial_merge_size) ** 2
        return int(picture["image_grid_thw"].prod()) // merge, f"{CONFIG}, {PICTURE}"
    return ASSUMED, "assumed, because the model does not say it: give --tokens-per-image"


def _of_processor(processor: Any) -> int:
    """The number that the processor gives, or 0."""
    counts = getattr(processor, "_get_num_multimodal_tokens", None)
    if counts is None:
        return 0
    try:
        return int(counts(image_sizes=[(SIDE, SIDE)]).num_image_tokens[0])
    except Exception:
        return 0


def _picture(config: Any) -> Inputs:
    """The outputs of the processor for one image that the config determines."""
    inputs = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    merge = getattr(vision, "spatial_merge_size", None)
    if isinstance(patch, int) and isinstance(merge, int) and patch > 0 and merge > 0:
        side = max(round(SIDE / (patch * merge)), 1) * merge
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]])
    return inputs


def _named(config: Any) -> int:
    """The number that an attribute of the config, or of a config inside it, gives; or 0."""
    inner = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    named = [getattr(config, name, None) for name in NAMES]
    named += [getattr(part, name, None) for part in inner for name in INNER_NAMES]
    return next((n for n in named if isinstance(n, int) and n > 0), 0)
