"""The part of the original image that each vision token shows: one function per kind of model.

Processors stretch, crop, pad and tile images before a model sees them. Each function here reverses
that. It returns, for every vision token of one image or video in prompt order, a rectangle in
pixels of the original, or None for a token that shows no part of it (line ends, class tokens).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from plphp.models import sizes
from plphp.models.boxes import TILES, Box, Patch, Places, cells, clip, grid_cells, padded
from plphp.models.layouts import Run


@dataclass(frozen=True)
class Shown:
    """One image or video as it appears in a prompt.

    config: the model's config
    size: (width, height) of the original, in pixels
    runs: columns [start, stop) of its vision tokens in the prompt
    index: its index among the images, or among the videos, of the call
    inputs: the processor's outputs without the pixels
    processor: the image processor, or None
    after: the id of the token after each run
    """

    config: Any
    size: tuple[int, int]
    runs: tuple[Run, ...]
    index: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict)
    processor: Any = None
    after: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(stop - start for start, stop in self.runs)

    @property
    def whole(self) -> Box:
        return Box(0, 0, *self.size)


Patches = Callable[[Shown], Places]


def unknown(shown: Shown) -> Places:
    """For families whose tokens cannot be located: no rectangles."""
    return []


def grid(name: str) -> Patches:
    """Qwen-VL, GLM-4V: a token is a square of merged patches of the stretched image.

    name: the processor output with the numbers (frames, rows, columns) of patches
    """

    def places(shown: Shown) -> Places:
        frames, rows, columns = (int(n) for n in shown.inputs[name][shown.index])
        merge = int(shown.config.vision_config.spatial_merge_size)
        each = (rows // merge, columns // merge)
        return [p for frame in range(frames) for p in cells(shown.whole, *each, frame=frame)]

    return places


def square(shown: Shown) -> Places:
    """LLaVA, PaliGemma: a square of patches of the stretched, cropped or padded image."""
    if shown.config.vision_config.model_type == "pixtral":
        return rows_of_patches(shown)
    class_tokens = shown.tokens - sizes.side(shown.config) ** 2
    return [None] * class_tokens + _square(_shown_part(shown), shown.config, shown.whole)


def pooled(shown: Shown) -> Places:
    """Gemma 3: a square of tokens, each the average of several patches of the stretched image."""
    return cells(shown.whole, math.isqrt(shown.tokens), math.isqrt(shown.tokens))


def rows_of_patches(shown: Shown) -> Places:
    """Pixtral, Mistral 3: each run is one row of patches of the stretched image."""
    start, stop = shown.runs[0]
    return cells(shown.whole, len(shown.runs), stop - start)


def latents(shown: Shown) -> Places:
    """Idefics2: latent tokens, each of which attends to a whole quarter or to the whole image."""
    each = shown.runs[0][1] - shown.runs[0][0]
    whole: Places = [Patch(shown.whole)] * each
    if len(shown.runs) == 1:
        return whole
    quarters = [p for p in cells(shown.whole, 2, 2, TILES) for _ in range(each)]
    return quarters + whole


def squarest(shown: Shown, count: int) -> tuple[int, int]:
    """The rows and columns of `count` tiles whose shape is closest to a square."""
    width, height = shown.size
    pairs = [(rows, count // rows) for rows in range(1, count + 1) if count % rows == 0]
    return min(pairs, key=lambda p: abs(math.log((width / p[1]) / (height / p[0]))))


def by_row_tokens(shown: Shown, count: int) -> tuple[int, int]:
    """The rows and columns of Ovis2's tiles, found from the <row> tokens of the prompt.

    transformers reads Ovis2's grid as (columns, rows), so that wide images get tall grids. The
    prompt alone shows the grid that was used.
    """
    row = shown.config.visual_indicator_token_ids[4]
    rows = 1 + shown.after.count(row)
    return rows, count // rows


def tiled(
    whole_first: bool = False, grid: Callable[[Shown, int], tuple[int, int]] = squarest
) -> Patches:
    """Idefics3, InternVL, Aya, Cohere2, Ovis2: tiles of the stretched image, and the whole image.

    whole_first: whether the whole image comes before its tiles
    grid: function from (image, number of tiles) to the rows and columns of tiles

    Each tile is one run, or `image_seq_length` tokens where tiles are adjacent.
    """

    def places(shown: Shown) -> Places:
        each = shown.runs[0][1] - shown.runs[0][0]
        if len(shown.runs) == 1:
            each = math.gcd(each, int(getattr(shown.config, "image_seq_length", each)))
        side, count = math.isqrt(each), shown.tokens // each - 1
        whole = cells(shown.whole, side, side)
        if count < 1:
            return whole
        tiles: Places = []
        for tile in cells(shown.whole, *grid(shown, count), TILES):
            assert tile is not None
            tiles += cells(tile.box, side, side, TILES)
        return whole + tiles if whole_first else tiles + whole

    return places


def anyres(shown: Shown) -> Places:
    """LLaVA-NeXT, LLaVA-OneVision: the whole image as a square, then unpadded tiles with line ends.

    In a prompt with several images, OneVision pads each to a square instead, and writes one line
    end.
    """
    config, (width, height) = shown.config, shown.size
    class_tokens: Places = [None] * sizes.classes(config)
    base = class_tokens + _square(shown.whole, config, shown.whole)
    if shown.tokens == len(base) + 1:
        return [*class_tokens, *_square(padded(shown.whole), config, shown.whole), None]
    found = sizes.tiling(config, height, width)
    scale = min(found.canvas[1] / width, found.canvas[0] / height)
    tops, lefts = (
        _tile_edges(config, length, canvas, cut, count, scale)
        for length, canvas, cut, count in zip(
            (height, width), found.canvas, found.cut, found.shown, strict=True
        )
    )
    tiles: Places = []
    for row in grid_cells(tops, lefts, shown.whole, TILES, 0):
        tiles += [*row, None]
    return base + tiles


def pooled_frames(shown: Shown) -> Places:
    """LLaVA-OneVision: each frame is a square pooled to half its side; one line end per video."""
    side = math.ceil(sizes.side(shown.config) / 2)
    seen = _covered(shown.whole, shown.config)
    frames = range((shown.tokens - 1) // side**2)
    return [*(p for f in frames for p in cells(seen, side, side, frame=f)), None]


def _square(box: Box, config: Any, within: Box) -> Places:
    """The patches of the vision tower's square input, which shows `box`, clipped to `within`."""
    side = sizes.side(config)
    return [clip(patch, within) for patch in cells(_covered(box, config), side, side) if patch]


def _covered(box: Box, config: Any) -> Box:
    """The part of `box` that whole patches cover; SigLIP's patches cover 27 x 14 of 384 pixels."""
    share = sizes.side(config) * config.vision_config.patch_size / config.vision_config.image_size
    return Box(box.left, box.top, box.left + share * box.width, box.top + share * box.height)


def _shown_part(shown: Shown) -> Box:
    """The part of the image that LLaVA's square input shows: CLIP crops it, SigLIP stretches it."""
    processor, box = shown.processor, shown.whole
    if getattr(processor, "do_pad", False):
        box = padded(box)
    kind = shown.config.vision_config.model_type
    crops = getattr(processor, "do_center_crop", "clip" in kind and "siglip" not in kind)
    if not crops:
        return box
    edge = _size_entry(getattr(processor, "size", None), "shortest_edge")
    share = _size_entry(getattr(processor, "crop_size", None), "height") / edge if edge else 1.0
    half = share * min(box.width, box.height) / 2
    x, y = (box.left + box.right) / 2, (box.top + box.bottom) / 2
    return Box(x - half, y - half, x + half, y + half)


def _size_entry(size: Any, name: str) -> float:
    """One number of a processor's size, which is a mapping or an object; 0 where it is missing."""
    found = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return float(found or 0)


def _tile_edges(
    config: Any, length: int, canvas: int, cut: int, count: int, scale: float
) -> list[float]:
    """The edges of tokens along one side of an image that was scaled and padded onto tiles.

    length: of the side, in pixels; canvas: of all tiles together, in pixels
    cut: patches left after the padding is cut off; count: tokens along the side
    scale: factor by which the image was scaled
    """
    size, patch = int(config.vision_config.image_size), int(config.vision_config.patch_size)
    side = sizes.side(config)
    first = (side * (canvas // size) - cut) // 2
    padding = (canvas - min(math.ceil(length * scale), canvas)) // 2

    def place(index: float) -> float:
        tile, patches = divmod(index, side)
        return (tile * size + patches * patch - padding) / scale

    return [place(first + i * cut / count) for i in range(count + 1)]
