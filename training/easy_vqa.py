"""easy-VQA, the third-party part: 5000 pictures of one coloured shape each, and questions.

The data (MIT, by Victor Zhou) come inside the PyPI package ``easy-vqa``; nothing is downloaded
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import easy_vqa
import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.demo.boards import COLOUR_NAMES
from plphp.demo.questions import Question

Split = Literal["train", "test"]

SHAPES = ["circle", "rectangle", "triangle"]
SIDE = 4  # cells of a picture: the image processor makes 112 px of its 64
UNKNOWN = -100  # what ``cross_entropy`` ignores

_READERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


class EasyVQA:
    """One split: pictures, also as the image processor resizes them, and questions about each."""

    def __init__(self, split: Split) -> None:
        read_questions, read_paths = _READERS[split]
        by_picture: dict[int, list[Question]] = {}
        for text, answer, picture in zip(*read_questions(), strict=True):
            question = Question("easyvqa", text, f"the answer is {answer}")
            by_picture.setdefault(picture, []).append(question)
        names, paths = sorted(by_picture), read_paths()
        self.questions = [by_picture[name] for name in names]
        self.images = [Image.open(paths[name]).convert("RGB") for name in names]
        size = (SIDE * 28, SIDE * 28)
        resized = [image.resize(size, Image.Resampling.BICUBIC) for image in self.images]
        self.pixels = np.stack([np.asarray(image) for image in resized])
        self.colours = np.array([_revealed(asked, COLOUR_NAMES) for asked in self.questions])
        self.shapes = np.array([_revealed(asked, SHAPES) for asked in self.questions])

    def sample(
        self, rng: Generator, questions: int = 8, flip: bool = True
    ) -> tuple[np.ndarray, list[Question]]:
        """A picture, mirrored half of the time if ``flip``, and some of its questions."""
        i = int(rng.integers(len(self.questions)))
        pixels = self.pixels[i]
        if flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        asked = self.questions[i]
        return pixels, [asked[int(j)] for j in rng.permutation(len(asked))[:questions]]


def _revealed(asked: list[Question], names: list[str]) -> int:
    """Which of ``names`` the answers give away about a picture, if any does."""
    answers = [question.answer.rsplit(" ", 1)[-1] for question in asked]
    return next((names.index(answer) for answer in reversed(answers) if answer in names), UNKNOWN)
