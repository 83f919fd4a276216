"""How many vision tokens an image will take, before there is one."""

from __future__ import annotations

from typing import Any

import torch

from plphp.models.families import FAMILIES, GENERIC
from plphp.models.sizes import Inputs

ASSUMED = 1024  # vision tokens of an image, where nothing says how many
SIDE = 1024  # pixels of the square picture, where the number depends on the picture's size
# Names under which configs give the tokens of every image
NAMES = ("mm_tokens_per_image", "vision_soft_tokens_per_image", "image_seq_length")
INNER_NAMES = ("num_image_tokens",)
PICTURE = f"for a picture of {SIDE} x {SIDE} pixels"


def image_tokens(config: Any, processor: Any = None) -> tuple[int, str]:
    """Vision tokens of an image, and what says so in words.

    processor: the model's, if it is at hand: it knows how pictures are scaled and tiled. Without
    it the family's rule answers, then the config. Where neither does it is ASSUMED, as the words
    say.
    """
    if processor is not None and (count := _of_processor(processor)):
        return count, f"its processor says, {PICTURE}"
    family = FAMILIES.get(getattr(config, "model_type", ""), GENERIC)
    picture = _picture(config)
    for inputs, words in (({}, "its config says"), (picture, PICTURE)):
        try:
            counted = family.images(config, inputs)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
            continue
        first = counted[0] if isinstance(counted, list) and counted else counted
        if isinstance(first, int) and first > 0:
            return first, words
    if count := _named(config):
        return count, "its config says"
    if "image_grid_thw" in picture:
        merge = int(config.vision_config.spatial_merge_size) ** 2
        return int(picture["image_grid_thw"].prod()) // merge, PICTURE
    return ASSUMED, "assumed: nothing at hand says how many, --tokens-per-image does"


def _of_processor(processor: Any) -> int:
    """What the processor says, 0 where it cannot."""
    counts = getattr(processor, "_get_num_multimodal_tokens", None)
    if counts is None:
        return 0
    try:
        return int(counts(image_sizes=[(SIDE, SIDE)]).num_image_tokens[0])
    except Exception:
        return 0


def _picture(config: Any) -> Inputs:
    """What a processor would return for one picture, as far as the config tells."""
    inputs = {"image_sizes": torch.tensor([[SIDE, SIDE]])}
    vision = getattr(config, "vision_config", None)
    patch = getattr(vision, "patch_size", None)
    merge = getattr(vision, "spatial_merge_size", None)
    if isinstance(patch, int) and isinstance(merge, int) and patch > 0 and merge > 0:
        side = max(round(SIDE / (patch * merge)), 1) * merge
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]])
    return inputs


def _named(config: Any) -> int:
    """The number that the config, or one inside it, gives for every image; 0 if none does."""
    inner = [getattr(config, name, None) for name in ("vision_config", "text_config")]
    named = [getattr(config, name, None) for name in NAMES]
    named += [getattr(part, name, None) for part in inner for name in INNER_NAMES]
    return next((n for n in named if isinstance(n, int) and n > 0), 0)
