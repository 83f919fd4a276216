"""How many vision tokens an image takes, family by family: one small entry each.

`counts` answers for the images of one call, in the order in which their tokens appear: a list
(one number an image), one number (every image alike), or None where only the prompt tells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Inputs = Mapping[str, Any]
Counts = list[int] | int | None


def unknown(config: Any, inputs: Inputs) -> Counts:
    return None


@dataclass(frozen=True)
class Family:
    """images, videos: tokens per image and per video, see the module's docstring.
    tiles: an image is cut into this many runs of tokens with one boundary token between them,
        where a chain of runs has that many or a multiple of it; 1 where it is never cut
    refused: why the family cannot be pruned, where it cannot
    """

    images: Callable[[Any, Inputs], Counts] = unknown
    videos: Callable[[Any, Inputs], Counts] = unknown
    tiles: int = 1
    refused: str = ""


def _grid(name: str) -> Callable[[Any, Inputs], Counts]:
    """Qwen-VL: `name` holds (t, h, w) patches of each image, merged in squares."""

    def counts(config: Any, inputs: Inputs) -> Counts:
        grid = inputs.get(name)
        if grid is None:
            return None
        merge = config.vision_config.spatial_merge_size**2
        sizes: list[int] = (grid.prod(-1) // merge).tolist()
        return sizes

    return counts


def _patches(config: Any, inputs: Inputs) -> Counts:
    """LLaVA: a square of patches; CLIP towers add a class token, "default" drops one token."""
    vision = config.vision_config
    patches = (int(vision.image_size) // int(vision.patch_size)) ** 2
    classes = 1 if "clip" in vision.model_type and "siglip" not in vision.model_type else 0
    dropped = 1 if config.vision_feature_select_strategy == "default" else 0
    return int(patches + classes - dropped)


def _anyres(config: Any, inputs: Inputs) -> Counts:
    """LLaVA-OneVision: a base square, then the unpadded tiles of the best fitting pinpoint.

    Samples of several images (`batch_num_images` above 1) take the base square and one newline.
    """
    sizes: Tensor | None = inputs.get("image_sizes")
    if sizes is None:
        return None
    vision = config.vision_config
    side = int(vision.image_size) // int(vision.patch_size)
    base = side * side - (1 if config.vision_feature_select_strategy == "default" else 0)
    per_sample = inputs.get("batch_num_images")
    alone = [True] * len(sizes)
    if per_sample is not None:
        alone = [n == 1 for n in per_sample.tolist() for _ in range(n)]
    return [
        base + (_tiles(config, int(h), int(w), side) if one else 1)
        for (h, w), one in zip(sizes.tolist(), alone, strict=True)
    ]


def _tiles(config: Any, height: int, width: int, side: int) -> int:
    """Tokens of an image's tiles: rows x columns after unpadding, and a newline a row."""
    pinpoints = config.image_grid_pinpoints
    fit_h, fit_w = max(pinpoints, key=lambda p: _fit(p[0], p[1], height, width))
    size = int(config.vision_config.image_size)
    rows, columns = side * int(fit_h // size), side * int(fit_w // size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    most = int(str(getattr(config, "vision_aspect_ratio", "anyres_max_9")).rpartition("_")[2])
    ratio = math.sqrt(rows * columns / (most * side * side))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return rows * columns + rows


def _fit(fit_h: int, fit_w: int, height: int, width: int) -> tuple[int, int]:
    """How well a resolution holds an image: most pixels used, then fewest wasted."""
    scale = min(fit_w / width, fit_h / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, used - fit_h * fit_w


QWEN_VL = Family(images=_grid("image_grid_thw"), videos=_grid("video_grid_thw"))

FAMILIES: dict[str, Family] = {
    "qwen2_vl": QWEN_VL,
    "llava": Family(images=_patches),  # Mantis-SigLIP-Llama3 is this class
    "llava_onevision": Family(images=_anyres),
    "idefics2": Family(tiles=5),  # four crops and the whole picture, or one run
    "mllama": Family(
        refused="vision tokens live in cross-attention layers, not in the KV cache of the prompt; "
        "there is nothing that this method could drop"
    ),
}

GENERIC = Family()
