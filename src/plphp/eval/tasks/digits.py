"""scikit-learn's digits (from UCI, 8 x 8 pixels, written by 43 people) as pages of handwriting.

Each sample has two pages of one row, on the same board as printed pages. The embedded model has
not been trained on digits and reads them as letters. Its score is therefore 0, and the task is
scored by agreement with the unpruned model.
"""

from __future__ import annotations

import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.demo.boards import CELL
from plphp.eval.sample import Sample

SIDE = 5  # cells of a board
INK = 16.0  # the darkest value of a pixel


def draw(count: int, seed: int) -> list[Sample]:
    """Two pictures of 4 or 5 digits; the question is about one of them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    rng = np.random.default_rng([seed, 2])
    return [_sample(rng, f"digits-{k}", digits.images, digits.target) for k in range(count)]


def _sample(rng: Generator, name: str, images: np.ndarray, target: np.ndarray) -> Sample:
    rows = [rng.permutation(len(images))[: int(rng.integers(4, SIDE + 1))] for _ in range(2)]
    pages = tuple(_page(rng, images[row]) for row in rows)
    asked = int(rng.integers(2))
    digits = " ".join(str(int(digit)) for digit in target[rows[asked]])
    return Sample(name, pages, f"read picture {asked + 1}.", (f"picture {asked + 1}: {digits}",))


def _page(rng: Generator, digits: np.ndarray) -> Image.Image:
    """One row of digits, (count, 8, 8) of 0 to 16, dark on light."""
    board = Image.new("L", (SIDE * CELL, SIDE * CELL), int(rng.integers(215, 256)))
    top, left = int(rng.integers(SIDE)), int(rng.integers(SIDE - len(digits) + 1))
    for i, digit in enumerate(digits):
        strokes = Image.fromarray(np.uint8(digit * (255 / INK)))
        mask = strokes.resize((CELL - 6, CELL - 4), Image.Resampling.BICUBIC)
        board.paste(15, ((left + i) * CELL + 3, top * CELL + 2), mask)
    return board.convert("RGB")
