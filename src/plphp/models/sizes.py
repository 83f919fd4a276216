"""How many vision tokens an image takes, from the config and what the processor returned.

Each function answers for the images of one call, in the order in which their tokens appear: a list
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
Sizes = Callable[[Any, Inputs], Counts]

# The entries of a model call that these functions read
NEEDED = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "batch_num_images",
    "pixel_values_videos",
)


def unknown(config: Any, inputs: Inputs) -> Counts:
    return None


def grid(name: str) -> Sizes:
    """Qwen-VL, GLM-4V: `name` holds (t, h, w) patches of each image, merged in squares."""

    def counts(config: Any, inputs: Inputs) -> Counts:
        patches = inputs.get(name)
        if patches is None:
            return None
        merge = config.vision_config.spatial_merge_size**2
        sizes: list[int] = (patches.prod(-1) // merge).tolist()
        return sizes

    return counts


def fixed(name: str) -> Sizes:
    """Every image takes what the config says under `name`."""
    return lambda config, inputs: getattr(config, name, None)


def patches(config: Any, inputs: Inputs) -> Counts:
    """LLaVA: a square of patches; CLIP towers add a class token, "default" drops one token.

    Pixtral-12B is this class with a tower that takes images of any size.
    """
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return merged_patches(config, inputs)
    return side(config) ** 2 + classes(config)


def merged_patches(config: Any, inputs: Inputs) -> Counts:
    """Pixtral: `image_sizes` in pixels, one token for a patch; Mistral 3 merges squares of them."""
    sizes: Tensor | None = inputs.get("image_sizes")
    if sizes is None:
        return None
    step = int(config.vision_config.patch_size) * int(getattr(config, "spatial_merge_size", 1))
    return [(int(h) // step) * (int(w) // step) for h, w in sizes.tolist()]


def anyres(config: Any, inputs: Inputs) -> Counts:
    """LLaVA-NeXT, LLaVA-OneVision: a base square, then the unpadded tiles of the best pinpoint.

    OneVision's samples of several images (`batch_num_images`) take the base and one newline.
    """
    sizes: Tensor | None = inputs.get("image_sizes")
    base = patches(config, inputs)
    if sizes is None or not isinstance(base, int):
        return None
    per_sample = inputs.get("batch_num_images")
    alone = [True] * len(sizes)
    if per_sample is not None:
        alone = [n == 1 for n in per_sample.tolist() for _ in range(n)]
    return [
        base + (_tiles(config, int(h), int(w)) if one else 1)
        for (h, w), one in zip(sizes.tolist(), alone, strict=True)
    ]


def pooled_frames(config: Any, inputs: Inputs) -> Counts:
    """LLaVA-OneVision: every frame pooled to half its side, and one newline a video."""
    pixels: Tensor | None = inputs.get("pixel_values_videos")
    if pixels is None:
        return None
    videos, frames = pixels.shape[:2]
    return [frames * math.ceil(side(config) / 2) ** 2 + 1] * videos


def side(config: Any) -> int:
    """Patches along a side of the vision tower's square input."""
    vision = config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def classes(config: Any) -> int:
    """Tokens that a LLaVA's tower puts before its patches and the model keeps."""
    kind = config.vision_config.model_type
    own = 1 if "clip" in kind and "siglip" not in kind else 0
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    return own - (1 if strategy == "default" else 0)


@dataclass(frozen=True)
class Tiling:
    """How an image fills the tiles of its best pinpoint.

    canvas: (height, width) in pixels of all tiles together
    cut: (rows, columns) of patches left once padding is cut off
    shown: (rows, columns) of tokens, fewer where tiles are shrunk
    """

    canvas: tuple[int, int]
    cut: tuple[int, int]
    shown: tuple[int, int]


def tiling(config: Any, height: int, width: int) -> Tiling:
    """The tiles of an image of LLaVA-NeXT or LLaVA-OneVision."""
    fit_h, fit_w = max(config.image_grid_pinpoints, key=lambda p: _fit(p[0], p[1], height, width))
    size = int(config.vision_config.image_size)
    rows, columns = side(config) * int(fit_h // size), side(config) * int(fit_w // size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    cut = rows, columns
    ratio = math.sqrt(rows * columns / _most(config))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return Tiling((fit_h, fit_w), cut, (rows, columns))


def _tiles(config: Any, height: int, width: int) -> int:
    """Tokens of an image's tiles: rows x columns after unpadding, and a newline a row."""
    rows, columns = tiling(config, height, width).shown
    return rows * columns + rows


def _most(config: Any) -> float:
    """Patches that tiles are shrunk to: "anyres_max_9" is nine base squares, others know no end."""
    name, _, tiles = str(getattr(config, "vision_aspect_ratio", "")).rpartition("_")
    return int(tiles) * side(config) ** 2 if name == "anyres_max" else math.inf


def _fit(fit_h: int, fit_w: int, height: int, width: int) -> tuple[int, int]:
    """How well a resolution holds an image: most pixels used, then fewest wasted."""
    scale = min(fit_w / width, fit_h / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, used - fit_h * fit_w
