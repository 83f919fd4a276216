"""The suite ``video``: the pictures of the drawn tasks are clips, in which one thing comes or goes.

A clip has 4 to 6 frames of a board on a held-out photograph, where a thing covers 2 x 2 vision
tokens. All frames have noise of their own, and are alike otherwise but for the board's last thing,
which stays, comes in the middle of the clip, is seen in one frame alone, or is elsewhere in every
frame. Pages stay. The questions are those about pictures: a thing is in the clip if any frame shows
it. The embedded model was trained on images only. It reads a clip because each frame has the tokens
of an image, with positions in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from plphp.demo.boards import COLOUR_NAMES, GLYPHS, Picture, Thing
from plphp.demo.painting import Canvas, paint
from plphp.demo.questions import Level, draw_boards, draw_size
from plphp.demo.regimes import PHOTOGRAPHS
from plphp.eval.sample import Task
from plphp.eval.tasks import boards

SUITE = "video"
SCALE = 2
LEVEL = Level((1, 2), (4, 5), (3, 4), (1, 2), (3, 4), 32, 0)
FRAMES = (4, 6)
NOISE = 4.0  # standard deviation of a frame's own noise, of 255
ONCE = "once"  # the last thing is seen in one frame alone
CHANGES = ("stays", "comes", ONCE, "moves")

Cell = tuple[int, int]


def suite() -> list[Task]:
    """The tasks of the suite. Their names have the form what@video."""
    anything = filmed(CHANGES)
    made: dict[str, tuple[boards.Make, boards.Show, str | None, str]] = {
        "once": (_once, filmed([ONCE]), None, "which thing has a color, seen in one frame alone"),
        "what": (boards.asked("what", LEVEL), anything, None, "which thing has a color"),
        "refer": (boards.asked("refcolor", LEVEL), anything, None, "the color of a thing"),
        "describe": (boards.asked("describe", LEVEL), anything, None, "all things that are seen"),
        "second": (
            boards.asked("what", LEVEL, boards.is_elsewhere),
            anything,
            "describe picture 1.",
            "a question about one clip after another one was described",
        ),
    }
    return [
        Task(
            f"{task}@{SUITE}",
            f"{what}, in 1 or 2 clips of {FRAMES[0]} to {FRAMES[1]} frames",
            boards.sampler(f"{task}@{SUITE}", make, earlier, show),
        )
        for task, (make, show, earlier, what) in made.items()
    ]


def filmed(changes: Sequence[str]) -> boards.Show:
    """A function that draws the frames (F, H, W, 3) uint8 of a board, with one of the changes."""

    def show(picture: Picture, rng: Generator) -> np.ndarray:
        count = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
        change = changes[int(rng.integers(len(changes)))] if picture.kind == "scene" else "stays"
        seed = int(rng.integers(2**31))
        canvas = Canvas(picture.side * SCALE, picture.columns * SCALE, SCALE)
        drawn = []
        for board in _film(picture, change, count, rng):
            # The same seed for all frames: the photograph and the other things do not change.
            pixels = paint(board, canvas, PHOTOGRAPHS, np.random.default_rng(seed))[0]
            own = rng.normal(0, NOISE, pixels.shape)
            drawn.append(np.clip(pixels + own, 0, 255).round().astype(np.uint8))
        return np.stack(drawn)

    return show


def _film(picture: Picture, change: str, count: int, rng: Generator) -> list[Picture]:
    """The board of each of `count` frames."""
    *others, last = picture.things
    thing = picture.things[last]
    rest = {cell: picture.things[cell] for cell in others}

    def board(cell: Cell | None) -> Picture:
        return replace(picture, things=rest if cell is None else {**rest, cell: thing})

    if change == "comes":
        first = int(rng.integers(1, count))
        return [board(last if frame >= first else None) for frame in range(count)]
    if change == ONCE:
        when = int(rng.integers(count))
        return [board(last if frame == when else None) for frame in range(count)]
    if change == "moves":
        every = [(row, column) for row in range(picture.side) for column in range(picture.columns)]
        free = [cell for cell in every if cell not in rest]
        return [board(free[int(place)]) for place in rng.permutation(len(free))[:count]]
    return [board(last)] * count


def _once(rng: Generator, number: int) -> boards.Drawn:
    """One or two scenes, and a question about the last thing of one of them."""
    count, side = draw_size(rng, LEVEL)
    while True:
        pictures = draw_boards(rng, LEVEL, [(side, None)] * count)
        if all(picture.kind == "scene" for picture in pictures):
            break
    where = int(rng.integers(count))
    things: Mapping[Cell, Thing] = pictures[where].things
    thing = list(things.values())[-1]
    colour, place = COLOUR_NAMES[thing.colour], f"picture {where + 1}"
    return (
        pictures,
        f"what is {colour} in {place}?",
        f"the {colour} object in {place} is the {GLYPHS[thing.glyph]}",
    )
