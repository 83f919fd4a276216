"""The number of vision tokens of each image, from the config and the processor's outputs.

Each function returns the numbers for the images of one call, in the order in which their tokens
appear: a list with one number per image, one number for all images, or None where the numbers
follow from the prompt only.
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

# The arguments of a model call that these functions read.
NEEDED = (
    "image_grid_thw",
    "video_grid_thw",
    "image_sizes",
    "batch_num_images",
    "pixel_values_videos",
)


def unknown(config: Any, inputs: Inputs) -> Counts:
    """For families whose numbers follow from the prompt only."""
    return None


def grid(name: str) -> Sizes:
    """Qwen-VL, GLM-4V: a token is a square of merged patches.

    name: the processor output with the numbers (frames, rows, columns) of patches of each image
    """

    def counts(config: Any, inputs: Inputs) -> Counts:
        patches = inputs.get(name)
        if patches is None:
            return None
        merge = config.vision_config.spatial_merge_size**2
        sizes: list[int] = (patches.prod(-1) // merge).tolist()
        return sizes

    return counts


def fixed(name: str) -> Sizes:
    """All images have the number of tokens that is the config's attribute `name`."""
    return lambda config, inputs: getattr(config, name, None)


def patches(config: Any, inputs: Inputs) -> Counts:
    """LLaVA: a square of patches, and a class token if a CLIP tower has one and the model keeps it.

    Pixtral-12B uses this class with a tower for images of any size.
    """
    vision = config.vision_config
    if vision.model_type == "pixtral":
        return merged_patches(config, inputs)
    return side(config) ** 2 + classes(config)


def merged_patches(config: Any, inputs: Inputs) -> Counts:
    """Pixtral: one token per patch; Mistral 3: one token per square of merged patches.

    `image_sizes` of the processor are in pixels.
    """
    sizes: Tensor | None = inputs.get("image_sizes")
    if sizes is None:
        return None
    step = int(config.vision_config.patch_size) * int(getattr(config, "spatial_merge_size", 1))
    return [(int(h) // step) * (int(w) // step) for h, w in sizes.tolist()]


def anyres(config: Any, inputs: Inputs) -> Counts:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image as a square, then its unpadded tiles.

    In a sample with several images (`batch_num_images`), OneVision's images are not tiled: each is
    a square and one newline.
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
        base + (_tile_tokens(config, int(h), int(w)) if one else 1)
        for (h, w), one in zip(sizes.tolist(), alone, strict=True)
    ]


def pooled_frames(config: Any, inputs: Inputs) -> Counts:
    """LLaVA-OneVision: each frame is pooled to half its side; a video ends with one newline."""
    pixels: Tensor | None = inputs.get("pixel_values_videos")
    if pixels is None:
        return None
    videos, frames = pixels.shape[:2]
    return [frames * math.ceil(side(config) / 2) ** 2 + 1] * videos


def side(config: Any) -> int:
    """The number of patches along one side of the vision tower's square input."""
    vision = config.vision_config
    return int(vision.image_size) // int(vision.patch_size)


def classes(config: Any) -> int:
    """The number of class tokens of LLaVA's vision tower that the model keeps, counted from 0.

    It is -1 where the model drops the first token of a tower without a class token.
    """
    kind = config.vision_config.model_type
    class_tokens = 1 if "clip" in kind and "siglip" not in kind else 0
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    return class_tokens - (1 if strategy == "default" else 0)


@dataclass(frozen=True)
class Tiling:
    """How an image fills the tiles of the resolution that is chosen for it.

    canvas: (height, width) in pixels of all tiles together
    cut: (rows, columns) of patches that are left after the padding is cut off
    shown: (rows, columns) of tokens, fewer than `cut` where the features are shrunk
    """

    canvas: tuple[int, int]
    cut: tuple[int, int]
    shown: tuple[int, int]


def tiling(config: Any, height: int, width: int) -> Tiling:
    """The tiles of an image of LLaVA-NeXT or LLaVA-OneVision. height, width: in pixels."""
    fit_h, fit_w = max(config.image_grid_pinpoints, key=lambda p: _fit(p[0], p[1], height, width))
    size = int(config.vision_config.image_size)
    rows, columns = side(config) * int(fit_h // size), side(config) * int(fit_w // size)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    cut = rows, columns
    ratio = math.sqrt(rows * columns / _largest_patches(config))
    if ratio > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return Tiling((fit_h, fit_w), cut, (rows, columns))


def _tile_tokens(config: Any, height: int, width: int) -> int:
    """The number of tokens of an image's tiles: unpadded rows x columns, and one newline a row."""
    rows, columns = tiling(config, height, width).shown
    return rows * columns + rows


def _largest_patches(config: Any) -> float:
    """The most patches that all tiles may have: nine squares for "anyres_max_9", else infinite."""
    name, _, tiles = str(getattr(config, "vision_aspect_ratio", "")).rpartition("_")
    return int(tiles) * side(config) ** 2 if name == "anyres_max" else math.inf


def _fit(fit_h: int, fit_w: int, height: int, width: int) -> tuple[int, int]:
    """A sort key of resolutions for an image: the most pixels used, then the fewest wasted."""
    scale = min(fit_w / width, fit_h / height)
    used = min(int(width * scale) * int(height * scale), width * height)
    return used, used - fit_h * fit_w
