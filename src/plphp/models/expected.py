"""The number of vision tokens that an image will have, from a processor or a config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from plphp.models.families import FAMILIES, GENERIC
from plphp.models.sizes import Inputs
from plphp.models.spans import vision_spans

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
    if processor is not None and (count := _of_processor(config, processor)):
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


def _of_processor(config: Any, processor: Any) -> int:
    """The number of vision tokens in a prompt that the processor makes, or 0.

    The number that transformers' processors give for a size comes last: that of Idefics3 counts
    the text tokens around the tiles too.
    """
    picture = Image.new("RGB", (SIDE, SIDE))
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    chat = [{"role": "user", "content": content}]
    made = {"return_dict": True, "return_tensors": "pt"}

    def told() -> int:
        counts = processor._get_num_multimodal_tokens(image_sizes=[(SIDE, SIDE)])
        return int(counts.num_image_tokens[0])

    ways: tuple[Callable[[], int], ...] = (
        lambda: _seen(config, processor.apply_chat_template(chat, tokenize=True, **made)),
        lambda: _seen(
            config, processor(images=[picture], text=[processor.image_token], return_tensors="pt")
        ),
        told,
    )
    for way in ways:
        try:
            count = way()
        except Exception:  # a processor without a chat template, a placeholder or such a function
            continue
        if count:
            return count
    return 0


def _seen(config: Any, inputs: Inputs) -> int:
    """The number of vision tokens in the arguments of generate()."""
    return int((vision_spans(config, **inputs) > 0).sum())


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
