"""Suites of the drawn tasks on held-out photographs. They differ in the tokens that a thing covers.

In ``dense`` a thing covers one vision token, in ``redundant-4`` 2 x 2 tokens, and in
``redundant-16`` 4 x 4 tokens. The boards are those of the other tasks. Boards with larger cells
have fewer of them, so that a prompt has less than 2,000 vision tokens. The photographs come with
scikit-image and scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from plphp.demo.boards import CELL, Picture
from plphp.demo.painting import Canvas, paint
from plphp.demo.questions import Level
from plphp.demo.regimes import PHOTOGRAPHS
from plphp.eval.sample import Task
from plphp.eval.tasks import boards

SCALES = {"dense": 1, "redundant-4": 2, "redundant-16": 4}
LEVELS = {  # the most difficult level that fits into 1,500 vision tokens at each scale
    1: boards.HARD,
    2: Level((2, 6), (4, 8), (3, 5), (1, 2), (3, 6), 375, 0),
    4: Level((2, 6), (3, 5), (3, 5), (1, 2), (3, 5), 93, 0),
}
# The share of pictures whose cells begin where vision tokens begin. In dense, all pictures are so.
ALIGNED_SHARE = 0.3


def suite(name: str) -> list[Task]:
    """The tasks of a suite. Their names have the form what@redundant-4."""
    scale = SCALES[name]
    level = LEVELS[scale]
    made: dict[str, tuple[boards.Make, str | None, str]] = {
        "needle": (boards.needle, None, "exact"),
        "difference": (boards.difference, None, "exact"),
        "refer": (boards.asked("refcolor", level), None, "exact"),
        "what": (boards.asked("what", level), None, "exact"),
        "describe": (boards.asked("describe", level), None, "exact"),
        "transcribe": (boards.asked("read", level, boards.is_row), None, "words"),
        "grid": (boards.asked("read", level, boards.is_grid), None, "words"),
        "long": (boards.asked("describe_all", boards.LONG_LEVEL, boards.is_long), None, "words"),
        "second": (
            boards.asked("what", level, boards.is_elsewhere),
            "describe picture 1.",
            "exact",
        ),
    }
    show = painter(scale)
    tokens = f"{scale * scale} vision token{'s' if scale > 1 else ''}"
    return [
        Task(
            f"{task}@{name}",
            f"{task}, where a thing covers {tokens}, on held-out photographs",
            boards.sampler(f"{task}@{name}", make, earlier, show),
            metric,
        )
        for task, (make, earlier, metric) in made.items()
    ]


def painter(scale: int) -> Callable[[Picture, Generator], np.ndarray]:
    """A function that draws a board on a photograph, with cells that are ``scale`` tokens wide.

    Most of the larger cells begin in the middle of a vision token.
    """

    def show(picture: Picture, rng: Generator) -> np.ndarray:
        high, wide = picture.side * scale, picture.columns * scale
        top = left = 0
        if scale > 1 and rng.random() >= ALIGNED_SHARE:
            high, wide = high + 1, wide + 1
            top, left = (int(edge) for edge in rng.integers(1, CELL + 1, 2))
        return paint(picture, Canvas(high, wide, scale, top, left), PHOTOGRAPHS, rng)[0]

    return show
