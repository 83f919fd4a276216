"""Makes the pictures and questions of ``plphp.demo``.

    python -m training.make_demo        # from the root of the repository

The seed was not used to train or measure the model. It is the first seed from 31001 on with which
both sets have a scene and a page. No picture or question was chosen by the model's answers.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.demo.boards import Picture, render
from plphp.demo.model import WEIGHTS
from plphp.demo.questions import LEVELS, Facts, Question, ask, draw_pictures

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
    (DEMO / "questions.json").write_text(json.dumps(prompts, indent=1) + "\n")


def _prompt(
    task: str, names: list[str], pictures: dict[str, Picture], rng: Generator
) -> dict[str, str | list[str]]:
    question = _ask([pictures[name] for name in names], task, rng)
    return {
        "images": [f"{name}.png" for name in names],
        "question": question.text,
        "expected": question.answer,
        "task": task,
    }


def _ask(pictures: list[Picture], task: str, rng: Generator) -> Question:
    """Draw a question of a task until one is not ambiguous."""
    facts = Facts(pictures)
    attempts = (ask(facts, task, rng) for _ in range(100))
    return next(question for question in attempts if question)


if __name__ == "__main__":
    main()
