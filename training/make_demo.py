"""Makes the pictures and questions of ``plphp.demo``.

    python -m training.make_demo        # from the root of the repository

The seeds were not used to train or measure a model. For the boards it is the first seed from 31001
on with which both sets have a scene and a page. For each of the two regimes it is the first seed,
from 31101 and from 31201 on, with which every task has a question; their photographs are held out.
No picture or question was chosen by a model's answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.demo.boards import Picture, render
from plphp.demo.model import WEIGHTS
from plphp.demo.questions import LEVELS, Facts, Question, ask, draw_pictures
from plphp.demo.regimes import REGIMES, Drawn, Frame, draw

SEED = 31005
DEMO = WEIGHTS.parent
LEVEL = LEVELS[3]
SETS = {"a": (6, 6), "b": (2, 8)}  # pictures, and cells to a side
PROMPTS = [  # task, and the pictures that its question is about
    ("describe", "b1"),
    ("read", "b2"),
    ("color", "b1 b2"),
    ("refcolor", "a1 a2 a3"),
    ("which", "a1 a2 a3"),
    ("all", "a1 a2 a3 a4"),
    ("describe_all", "a2 a3 a4 a5"),
    ("read", "a1 a2 a3 a4 a5"),
    ("describe", "a1 a2 a3 a4 a5 a6"),
    ("what", "a1 a2 a3 a4 a5 a6"),
]


TASKS = ("what", "refcolor", "which", "describe", "read")
# Letter -> the regime, the size of each of its four pictures in vision tokens, the first seed
BEHIND_PHOTOGRAPHS = {
    "c": ("redundant-4", ((10, 10), (8, 12), (10, 10), (12, 8)), 31101),
    "d": ("redundant-16", ((12, 12), (12, 12), (12, 16), (16, 12)), 31201),
}
JPEG = {"quality": 95, "subsampling": 0}  # photographs as PNG take five times as much


def main() -> None:
    rng = np.random.default_rng(SEED)
    drawn = {letter: draw_pictures(rng, LEVEL, *size) for letter, size in SETS.items()}
    pictures = {
        f"{letter}{i}": picture
        for letter, some in drawn.items()
        for i, picture in enumerate(some, 1)
    }
    folder = DEMO / "pictures"
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(render(picture, rng)).save(folder / f"{name}.png", optimize=True)
    prompts = [_prompt(task, names.split(), pictures, rng) for task, names in PROMPTS]
    for letter, (regime, sizes, first) in BEHIND_PHOTOGRAPHS.items():
        prompts += _of_regime(letter, regime, sizes, first, folder)
    (DEMO / "questions.json").write_text(json.dumps(prompts, indent=1) + "\n")


def _of_regime(
    letter: str, regime: str, sizes: tuple[tuple[int, int], ...], first: int, folder: Path
) -> list[dict[str, str | list[str]]]:
    """One question for every task about four pictures, which are saved as JPEG."""
    drawn = next(found for found in map(_drawer(regime, sizes), count(first)) if _complete(found))
    names = [f"{letter}{i}.jpg" for i in range(1, len(sizes) + 1)]
    for name, image in zip(names, drawn.images, strict=True):
        Image.fromarray(image).save(folder / name, **JPEG)
    return [_entry(names, question, regime) for question in drawn.questions]


def _drawer(regime: str, sizes: tuple[tuple[int, int], ...]) -> Callable[[int], Drawn]:
    """What draws the pictures and questions of a seed."""
    kind, frame = REGIMES[regime], Frame(sizes, REGIMES[regime].scales[0])
    return lambda seed: draw(np.random.default_rng(seed), kind, frame, TASKS)


def _complete(drawn: Drawn) -> bool:
    """Whether there is a question for every task."""
    return {question.task for question in drawn.questions} == set(TASKS)


def _prompt(
    task: str, names: list[str], pictures: dict[str, Picture], rng: Generator
) -> dict[str, str | list[str]]:
    question = _ask([pictures[name] for name in names], task, rng)
    return _entry([f"{name}.png" for name in names], question, "dense")


def _entry(images: Sequence[str], question: Question, regime: str) -> dict[str, str | list[str]]:
    return {
        "images": list(images),
        "question": question.text,
        "expected": question.answer,
        "task": question.task,
        "regime": regime,
    }


def _ask(pictures: list[Picture], task: str, rng: Generator) -> Question:
    """Draw a question of a task until one is not ambiguous."""
    facts = Facts(pictures)
    attempts = (ask(facts, task, rng) for _ in range(100))
    return next(question for question in attempts if question)


if __name__ == "__main__":
    main()
