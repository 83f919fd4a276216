"""Draws pictures: boards of 28-pixel cells with coloured letters and shapes.

A cell of 28 x 28 pixels is one vision token (2 x 2 patches of 14 pixels, merged), so that a board
of n x n cells has n * n vision tokens. A *scene* has a few things of different colours in random
cells. A *page* is a block of letters in one colour. A numpy ``Generator`` determines each picture;
the order of the random numbers must not change. Letters are drawn with matplotlib's fonts (the
extra `eval`).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import matplotlib
import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFont

CELL = 28
COLOURS = {
    "red": (228, 18, 18),
    "green": (10, 165, 25),
    "blue": (20, 40, 235),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (0, 140, 140),
    "brown": (160, 48, 40),
    "yellow": (248, 232, 0),
}  # the eight colours of easy-VQA
COLOUR_NAMES = list(COLOURS)
COLOUR_VALUES = np.array(list(COLOURS.values()), np.float32)
LETTERS = list("ABCDEFGHJKLMNPQRSTUVWXYZ")  # without I and O, which look like 1 and 0
SHAPES = ["circle", "square", "triangle", "star"]
GLYPHS = LETTERS + SHAPES

FONT_FOLDER = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FONTS = ["DejaVuSans-Bold.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono-Bold.ttf"]
FONT_SIZES = (18, 21, 24)
STYLES = len(FONT_SIZES) * len(FONTS)


class Thing(NamedTuple):
    """The content of a cell, as indices into ``GLYPHS`` and ``COLOUR_NAMES``."""

    glyph: int
    colour: int

    def __str__(self) -> str:
        return f"{COLOUR_NAMES[self.colour]} {GLYPHS[self.glyph]}"


@dataclass(frozen=True)
class Picture:
    """A board.

    side: number of rows
    things: (row, column) -> the thing in that cell
    wide: number of columns; None for a square board
    """

    side: int
    things: dict[tuple[int, int], Thing]
    kind: Literal["scene", "page"]
    wide: int | None = None

    @property
    def columns(self) -> int:
        return self.side if self.wide is None else self.wide


def draw_scene(
    rng: Generator,
    side: int,
    glyphs: Collection[int],
    colours: Collection[int],
    wide: int | None = None,
) -> Picture:
    """A scene with the given things, each in another random cell."""
    columns = side if wide is None else wide
    cells = rng.permutation(side * columns)[: len(glyphs)]
    things = {
        (int(cell) // columns, int(cell) % columns): Thing(int(glyph), int(colour))
        for cell, glyph, colour in zip(cells, glyphs, colours, strict=True)
    }
    return Picture(side, things, "scene", wide)


def draw_page(
    rng: Generator, side: int, rows: int, columns: int, wide: int | None = None
) -> Picture:
    """A page: a block of ``rows`` x ``columns`` different letters in one colour."""
    right = (side if wide is None else wide) - columns
    top, left = int(rng.integers(side - rows + 1)), int(rng.integers(right + 1))
    glyphs = rng.permutation(len(LETTERS))[: rows * columns]
    colour = int(rng.integers(len(COLOURS)))
    things = {
        (top + i // columns, left + i % columns): Thing(int(glyphs[i]), colour)
        for i in range(rows * columns)
    }
    return Picture(side, things, "page", wide)


def render(picture: Picture, rng: Generator) -> np.ndarray:
    """The pixels uint8 [28 side, 28 side, 3]: a light background, jittered things, and noise."""
    size = picture.side * CELL
    image = np.empty((size, size, 3), np.float32)
    image[:] = rng.integers(215, 256, 3)
    for (row, column), thing in picture.things.items():
        mask = MASKS[thing.glyph, rng.integers(STYLES)]
        mask = np.roll(mask, tuple(rng.integers(-2, 3, 2)), (0, 1))[..., None]
        colour = np.clip(COLOUR_VALUES[thing.colour] + rng.integers(-14, 15, 3), 0, 255)
        cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell *= 1 - mask
        cell += mask * colour
    y, x = rng.integers(0, NOISE.shape[1] - size + 1, 2)
    image += NOISE[rng.integers(len(NOISE)), y : y + size, x : x + size, None]
    return np.clip(image, 0, 255).astype(np.uint8)


def to_patches(image: np.ndarray) -> np.ndarray:
    """The patches [4 side^2, 588] of one frame, as ``Qwen2VLImageProcessor`` computes them."""
    high, wide = image.shape[0] // 14, image.shape[1] // 14
    pixels = (image.astype(np.float32) / 255 - 0.5) / 0.5
    merged = pixels.reshape(high // 2, 2, 14, wide // 2, 2, 14, 3)
    return merged.transpose(0, 3, 1, 4, 6, 2, 5).reshape(high * wide, 588)


def glyph_mask(glyph: str, font_file: str, size: float, cell: int) -> np.ndarray:
    """A glyph of ``size`` pixels in the middle of ``cell`` x ``cell`` pixels; 1 is ink."""
    image = Image.new("L", (cell, cell), 0)
    draw = ImageDraw.Draw(image)
    if glyph in SHAPES:
        _draw_shape(draw, glyph, size * 0.42, cell / 2)
    else:
        _draw_letter(draw, glyph, _font(font_file, size), cell)
    return np.asarray(image, np.float32) / 255


@lru_cache(1000)
def _font(font_file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(FONT_FOLDER / font_file, size)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: str, radius: float, middle: float) -> None:
    low, high = middle - radius, middle + radius
    if shape == "circle":
        draw.ellipse([low, low, high, high], fill=255)
    elif shape == "square":
        draw.rectangle([low, low, high, high], fill=255)
    elif shape == "triangle":
        draw.polygon([(middle, low), (low, high), (high, high)], fill=255)
    elif shape == "star":
        draw.polygon([_star_corner(middle, radius, corner) for corner in range(10)], fill=255)


def _star_corner(middle: float, radius: float, corner: int) -> tuple[float, float]:
    reach = radius * (1.2, 0.5)[corner % 2]
    angle = corner * math.pi / 5
    return middle + reach * math.sin(angle), middle - reach * math.cos(angle)


def _draw_letter(
    draw: ImageDraw.ImageDraw, letter: str, font: ImageFont.FreeTypeFont, cell: int
) -> None:
    left, top, right, bottom = draw.textbbox((0, 0), letter, font=font)
    corner = ((cell - (right - left)) / 2 - left, (cell - (bottom - top)) / 2 - top)
    draw.text(corner, letter, font=font, fill=255)


MASKS = np.array(
    [
        [glyph_mask(glyph, font, size, CELL) for size in FONT_SIZES for font in FONTS]
        for glyph in GLYPHS
    ]
)  # [glyph, style, 28, 28], from 0 (background) to 1
NOISE = np.random.default_rng(0).normal(0, 4, (8, 320, 320)).astype(np.float32)
