"""Rectangles of an image, and how they are cut into the parts that vision tokens show."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

WHOLE, TILES = 0, 1  # views: a model may see an image twice, as a whole and cut into tiles


@dataclass(frozen=True)
class Box:
    """A rectangle, in pixels of the original image."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.bottom - self.top


@dataclass(frozen=True)
class Patch:
    """The part of an image or video that one vision token shows.

    box: the rectangle
    view: WHOLE, or TILES for a token of a tile
    frame: index among the sampled frames of a video, 0 for an image
    """

    box: Box
    view: int = WHOLE
    frame: int = 0


Places = list[Patch | None]


def cells(box: Box, rows: int, columns: int, view: int = WHOLE, frame: int = 0) -> Places:
    """A box that is cut into rows and columns of equal cells, listed row by row."""
    tops = [box.top + i * box.height / rows for i in range(rows + 1)]
    lefts = [box.left + i * box.width / columns for i in range(columns + 1)]
    return [p for row in grid_cells(tops, lefts, None, view, frame) for p in row]


def grid_cells(
    tops: list[float], lefts: list[float], within: Box | None, view: int, frame: int
) -> list[Places]:
    """Cells between edges, row by row; what lies outside of `within` is cut off."""
    return [
        [
            clip(Patch(Box(left, top, right, bottom), view, frame), within)
            for left, right in pairwise(lefts)
        ]
        for top, bottom in pairwise(tops)
    ]


def clip(patch: Patch, within: Box | None) -> Patch | None:
    """The part of a patch inside of a box; None where there is none."""
    if within is None:
        return patch
    box = Box(
        max(patch.box.left, within.left),
        max(patch.box.top, within.top),
        min(patch.box.right, within.right),
        min(patch.box.bottom, within.bottom),
    )
    return Patch(box, patch.view, patch.frame) if box.width > 0 and box.height > 0 else None


def padded(box: Box) -> Box:
    """The smallest square that contains a box and has the same centre."""
    more = abs(box.width - box.height) / 2
    across, down = (0.0, more) if box.width > box.height else (more, 0.0)
    return Box(box.left - across, box.top - down, box.right + across, box.bottom + down)
