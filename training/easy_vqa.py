"""easy-VQA: 5,000 pictures of one coloured shape each, and questions about them.

The data (MIT, by Victor Zhou) are part of the PyPI package ``easy-vqa``; nothing is downloaded.
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
SIDE = 4  # cells per side: the image processor enlarges the pictures from 64 to 112 pixels
UNKNOWN = -100  # the class that ``cross_entropy`` ignores

_READERS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
}


class EasyVQA:
    """One split of the data.

    images, pixels: the pictures, as they are and as the image processor resizes them
    questions: the questions about each picture
    colours, shapes: the classes of each picture, as far as the answers give them
    """

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
        """A picture and some of its questions. With ``flip`` half of the pictures are mirrored."""
        i = int(rng.integers(len(self.questions)))
        pixels = self.pixels[i]
        if flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        asked = self.questions[i]
        return pixels, [asked[int(j)] for j in rng.permutation(len(asked))[:questions]]


def _revealed(asked: list[Question], names: list[str]) -> int:
    """The index of the name in ``names`` that the answers about a picture contain, or UNKNOWN."""
    answers = [question.answer.rsplit(" ", 1)[-1] for question in asked]
    return next((names.index(answer) for answer in reversed(answers) if answer in names), UNKNOWN)
