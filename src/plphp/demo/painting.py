"""Draws boards whose cells cover ``scale`` x ``scale`` vision tokens.

The background is plain paper or a crop of a photograph. A board need not begin where a vision token
begins. ``paint`` also returns which thing each token shows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw, ImageFilter

from plphp.demo.boards import CELL, COLOUR_VALUES, FONTS, GLYPHS, NOISE, Picture, Thing, glyph_mask
from plphp.demo.photographs import crop

GLYPH_SIZES = (0.66, 0.92)  # smallest and largest font size, as a share of the cell
HALO = 0.06  # width of the pale rim of things on a photograph, as a share of the cell
EMPTY, UNCLEAR = -1, -2  # in a map: a token that shows nothing, and one that shows too little
SHOWS = 0.35  # a token shows a thing if the box of the thing's ink covers this share of the token


@dataclass(frozen=True)
class Look:
    """What makes things hard to recognise. Shares without another note are shares of the pictures.

    photographs: names of the photographs for backgrounds, () for paper only
    """

    photographs: tuple[str, ...] = ()
    photograph_share: float = 1.0
    shading_share: float = 0.0
    clutter_share: float = 0.0
    occlusion_share: float = 0.0  # share of the things


@dataclass(frozen=True)
class Canvas:
    """The size of a picture in vision tokens, and the corner of its board in pixels."""

    high: int
    wide: int
    scale: int
    top: int = 0
    left: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and columns of cells that fit."""
        cell = CELL * self.scale
        return (self.high * CELL - self.top) // cell, (self.wide * CELL - self.left) // cell


def paint(
    picture: Picture, canvas: Canvas, look: Look, rng: Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels uint8 [28 high, 28 wide, 3], and the map of the tokens int64 [high, wide, 2].

    The map has the glyph and the colour of the thing that a token shows, or EMPTY, or UNCLEAR.
    """
    high, wide = canvas.high * CELL, canvas.wide * CELL
    image, photo = _ground(rng, look, high, wide)
    if rng.random() < look.clutter_share:
        image = _clutter(rng, image, CELL * canvas.scale)
    covered = np.zeros((canvas.high, canvas.wide))
    shown = np.full((canvas.high, canvas.wide, 2), EMPTY)
    for (row, column), thing in picture.things.items():
        corner = _place(rng, canvas, row, column)
        box = _draw_thing(rng, image, thing, corner, CELL * canvas.scale, photo)
        _mark(shown, covered, thing, box)
        if rng.random() < look.occlusion_share:
            _occlude(rng, image, box)
    y, x = rng.integers(0, NOISE.shape[1], 2)
    noise = NOISE[rng.integers(len(NOISE))]
    rows, columns = (np.arange(high) + y) % len(noise), (np.arange(wide) + x) % len(noise)
    image += noise[rows[:, None], columns][..., None]
    return np.clip(image, 0, 255).astype(np.uint8), shown


def _ground(rng: Generator, look: Look, high: int, wide: int) -> tuple[np.ndarray, bool]:
    """The background float32 [high, wide, 3], and whether it is a photograph."""
    photo = bool(look.photographs) and rng.random() < look.photograph_share
    if photo:
        image = crop(rng, look.photographs, high, wide).copy()
        paleness = rng.uniform(0, 0.5)
        image *= (1 - paleness) * rng.uniform(0.9, 1.1, 3).astype(np.float32)
        image += paleness * 255
    else:
        image = np.empty((high, wide, 3), np.float32)
        image[:] = rng.integers(215, 256, 3)
    if rng.random() < look.shading_share:
        angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.35)
        y, x = np.linspace(-1, 1, high)[:, None], np.linspace(-1, 1, wide)
        slope = (np.cos(angle) * y + np.sin(angle) * x) / 2.83 + 0.5
        image *= (1 - depth * slope).astype(np.float32)[..., None]
    return image, photo


def _clutter(rng: Generator, image: np.ndarray, cell: int) -> np.ndarray:
    """The background with lines, arcs and spots of random colours."""
    drawn = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(drawn)
    high, wide = image.shape[:2]
    for _ in range(int(rng.integers(3, 5 + high * wide // (6 * cell * cell)))):
        x, y = rng.uniform(0, wide), rng.uniform(0, high)
        dx, dy = rng.uniform(-1.5, 1.5, 2) * cell
        colour = tuple(int(value) for value in rng.integers(60, 256, 3))
        thick = int(rng.integers(1, 2 + cell // 14))
        kind = rng.integers(3)
        if kind == 0:
            draw.line([x, y, x + dx, y + dy], fill=colour, width=thick)
        elif kind == 1:
            reach = cell * rng.uniform(0.3, 1.2)
            start = float(rng.uniform(0, 360))
            box = [x - reach, y - reach, x + reach, y + reach]
            draw.arc(box, start, start + rng.uniform(40, 200), fill=colour, width=thick)
        else:
            reach = cell * rng.uniform(0.05, 0.2)
            draw.ellipse([x - reach, y - reach, x + reach, y + reach], fill=colour)
    return np.asarray(drawn, np.float32).copy()


def _place(rng: Generator, canvas: Canvas, row: int, column: int) -> tuple[int, int]:
    """The corner of a cell in pixels, with a random shift that stays on the canvas."""
    cell, reach = CELL * canvas.scale, 2 * canvas.scale
    top = canvas.top + row * cell + int(rng.integers(-reach, reach + 1))
    left = canvas.left + column * cell + int(rng.integers(-reach, reach + 1))
    return (
        min(max(top, 0), canvas.high * CELL - cell),
        min(max(left, 0), canvas.wide * CELL - cell),
    )


def _draw_thing(
    rng: Generator,
    image: np.ndarray,
    thing: Thing,
    corner: tuple[int, int],
    cell: int,
    photo: bool,
) -> tuple[int, int, int, int]:
    """Draw a thing into ``image``. Returns the box of its ink: top, left, bottom, right."""
    font = FONTS[int(rng.integers(len(FONTS)))]
    size = round(float(rng.uniform(*GLYPH_SIZES)) * cell)
    mask = glyph_mask(GLYPHS[thing.glyph], font, size, cell)
    colour = np.clip(COLOUR_VALUES[thing.colour] + rng.integers(-14, 15, 3), 0, 255)
    top, left = corner
    part = image[top : top + cell, left : left + cell]
    if photo:
        rim = _rim(mask, cell)[..., None] * float(rng.uniform(0.7, 1.0))
        part *= 1 - rim
        part += rim * rng.uniform(225, 255)
    part *= 1 - mask[..., None]
    part += mask[..., None] * colour
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return top + int(rows[0]), left + int(columns[0]), top + int(rows[-1]), left + int(columns[-1])


def _rim(mask: np.ndarray, cell: int) -> np.ndarray:
    """The mask of the pale rim: the glyph, made wider and soft."""
    ink = Image.fromarray((mask * 255).astype(np.uint8))
    reach = max(1, round(HALO * cell))
    blurred = ink.filter(ImageFilter.GaussianBlur(reach))
    return np.clip(np.asarray(blurred, np.float32) / 255 * 3, 0, 1)


def _occlude(rng: Generator, image: np.ndarray, box: tuple[int, int, int, int]) -> None:
    """Draw a strip of one colour over an eighth to a fifth of the box of the ink."""
    top, left, bottom, right = box
    colour = rng.integers(120, 256, 3)
    share = rng.uniform(0.12, 0.2)
    if rng.random() < 0.5:
        thick = max(1, round((bottom - top) * share))
        at = int(rng.integers(top, bottom - thick + 1))
        image[at : at + thick, left : right + 1] = colour
    else:
        thick = max(1, round((right - left) * share))
        at = int(rng.integers(left, right - thick + 1))
        image[top : bottom + 1, at : at + thick] = colour


def _mark(
    shown: np.ndarray, covered: np.ndarray, thing: Thing, box: tuple[int, int, int, int]
) -> None:
    """Write a thing into the map. A token with two things shows the one that covers more of it."""
    top, left, bottom, right = box
    rows = slice(top // CELL, bottom // CELL + 1)
    columns = slice(left // CELL, right // CELL + 1)
    down = _overlap(rows, top, bottom + 1)
    across = _overlap(columns, left, right + 1)
    share = down[:, None] * across
    clear = share >= min(SHOWS, float(share.max()))
    part, before = shown[rows, columns], covered[rows, columns]
    wins = share > before
    part[wins & clear] = (thing.glyph, thing.colour)
    part[wins & ~clear] = UNCLEAR
    before[wins] = share[wins]


def _overlap(tokens: slice, start: int, end: int) -> np.ndarray:
    """The share of each token of a row, or column, that lies between two pixels."""
    begins = np.arange(tokens.start, tokens.stop) * CELL
    shared: np.ndarray = np.minimum(begins + CELL, end) - np.maximum(begins, start)
    return shared / CELL
