"""Draws the batches of training steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from plphp.demo.boards import CELL, COLOURS, GLYPHS, Picture, draw_scene, render, to_patches
from plphp.demo.painting import EMPTY, UNCLEAR, Canvas, Look, paint
from plphp.demo.questions import LEVELS, Question, draw_prompt, draw_size
from plphp.demo.regimes import Frame, Regime, draw, draw_frame
from training.easy_vqa import SIDE, EasyVQA

EASY_TOKENS = 1400
EASY_SAMPLE_TOKENS = 140
HEADER_TOKENS = 5  # tokens of "Picture 1:" and of the marks around a picture
QUESTION_TOKENS = 260  # the approximate number of tokens of a round of questions
ROUND_TOKENS = 500  # a prompt gets one more round of questions for this number of vision tokens
# The share of pictures whose cells begin between tokens, where a thing covers one token
FREE_SHARE = 0.15
CROWDED = (0.25, 0.7)  # the smallest and largest share of full cells in the vision stage


@dataclass(frozen=True)
class Views:
    """The pictures of one size, of all samples.

    high, wide: the size in vision tokens
    count: number of these pictures in each sample
    patches: [samples * count, 4 high wide, 588]
    """

    high: int
    wide: int
    count: int
    patches: Tensor


@dataclass(frozen=True)
class Batch:
    """Samples whose pictures have the same sizes, and questions about each sample.

    maps: int64 [samples, vision tokens, 2], the glyph and the colour that each token shows, or None
    name: suffix of the names of the scores
    """

    frame: Frame
    questions: list[list[Question]]
    views: list[Views]
    maps: Tensor | None
    name: str


def regime_batch(rng: Generator, regime: Regime, tasks: Sequence[str], budget: int) -> Batch:
    """A batch of a regime with about ``budget`` tokens, but at least one sample."""
    while True:
        frame = draw_frame(rng, regime)
        prefix = frame.tokens + HEADER_TOKENS * len(frame.sizes)
        rounds = 1 + frame.tokens // ROUND_TOKENS
        samples = max(1, budget // (prefix + rounds * QUESTION_TOKENS))
        drawn = [draw(rng, regime, frame, list(tasks) * rounds) for _ in range(samples)]
        questions = [prompt.questions for prompt in drawn]
        if all(questions):
            break
    maps = [np.concatenate([m.reshape(-1, 2) for m in prompt.maps]) for prompt in drawn]
    views = _views(frame, [prompt.images for prompt in drawn])
    return Batch(frame, questions, views, torch.tensor(np.stack(maps)), f"@{frame.scale}")


def level_batch(rng: Generator, number: int, tasks: Sequence[str], budget: int) -> Batch:
    """A batch of square pictures on plain paper, in which each thing covers one token.

    The pictures of the demo and of the dense suites are such pictures.
    """
    level = LEVELS[number]
    pictures, side = draw_size(rng, level)
    sample_tokens = pictures * (side * side + HEADER_TOKENS) + level.question_tokens
    samples = max(1, budget // sample_tokens)
    prompts = [draw_prompt(rng, level, pictures, side, tasks) for _ in range(samples)]
    images = [[render(picture, rng) for picture in drawn] for drawn, _ in prompts]
    frame = Frame(((side, side),) * pictures, 1)
    questions = [asked for _, asked in prompts]
    return Batch(frame, questions, _views(frame, images), None, f"@L{number}")


def easy_batch(rng: Generator, easy: EasyVQA) -> Batch:
    """A batch of pictures of easy-VQA, one in each sample."""
    samples = [easy.sample(rng) for _ in range(EASY_TOKENS // EASY_SAMPLE_TOKENS)]
    frame = Frame(((SIDE, SIDE),), 1)
    views = _views(frame, [[image] for image, _ in samples])
    return Batch(frame, [questions for _, questions in samples], views, None, "")


def crowded_views(rng: Generator, look: Look, scale: int, budget: int) -> tuple[Views, Tensor]:
    """Pictures of one size with more things than prompts have, and their maps [N, tokens, 2]."""
    rows, columns = (int(rng.integers(2, max(4, 9 - 2 * scale) + 1)) for _ in range(2))
    # A token that shows half of a thing is hard to name. At scale 1 such tokens are made rare.
    free = scale > 1 or rng.random() < FREE_SHARE
    high, wide = (edge * scale + free * int(rng.integers(scale + 1)) for edge in (rows, columns))
    painted = []
    for _ in range(max(1, budget // (high * wide))):
        rest = ((high - rows * scale) * CELL, (wide - columns * scale) * CELL)
        top, left = (int(rng.integers(room + 1)) for room in rest)
        canvas = Canvas(high, wide, scale, top, left)
        painted.append(paint(_crowd(rng, rows, columns), canvas, look, rng))
    maps = torch.tensor(np.stack([shown.reshape(-1, 2) for _, shown in painted]))
    return Views(high, wide, 1, as_patches([image for image, _ in painted])), maps


def as_patches(images: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor(np.stack([to_patches(image) for image in images]))


def targets(maps: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
    """The glyph class and the colour class of all tokens. The last class of each means "empty"."""
    glyphs, colours = maps.flatten(0, 1).unbind(1)
    empty = ((glyphs, len(GLYPHS)), (colours, len(COLOURS)))
    found = [
        c.masked_fill(c == EMPTY, last).masked_fill(c == UNCLEAR, ignored) for c, last in empty
    ]
    return found[0], found[1]


def _classes(found: Tensor, empty: int, ignored: int) -> Tensor:
    return found.masked_fill(found == EMPTY, empty).masked_fill(found == UNCLEAR, ignored)


def _crowd(rng: Generator, rows: int, columns: int) -> Picture:
    count = max(1, int(rows * columns * rng.uniform(*CROWDED)))
    glyphs = rng.integers(0, len(GLYPHS), count)
    colours = rng.integers(0, len(COLOURS), count)
    return draw_scene(rng, rows, glyphs, colours, columns)


def _views(frame: Frame, images: Sequence[Sequence[np.ndarray]]) -> list[Views]:
    """Group adjacent pictures of the same size."""
    views, first = [], 0
    for (high, wide), alike in groupby(frame.sizes):
        count = len(list(alike))
        flat = [image for row in images for image in row[first : first + count]]
        views.append(Views(high, wide, count, as_patches(flat)))
        first += count
    return views
