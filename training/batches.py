"""What one training step looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from plphp.demo.boards import render, to_patches
from plphp.demo.questions import Level, Question, draw_prompt, draw_size
from training.easy_vqa import SIDE, EasyVQA

PICTURE_TOKENS = 4000  # per step, about: what two cores do in 1.4 seconds
EASY_TOKENS = 1400
EASY_SAMPLE_TOKENS = 140
HEADER_TOKENS = 5  # "Picture 1:", and what opens and closes it


@dataclass(frozen=True)
class Batch:
    """Samples of one shape: ``pictures`` pictures of ``side`` x ``side`` cells, and questions."""

    pictures: int
    side: int
    questions: list[list[Question]]
    patches: Tensor  # [samples * pictures, 4 side^2, 588]


def picture_batch(rng: Generator, level: Level, tasks: Sequence[str]) -> Batch:
    """Drawn pictures."""
    pictures, side = draw_size(rng, level)
    sample_tokens = pictures * (side * side + HEADER_TOKENS) + level.question_tokens
    samples = max(1, PICTURE_TOKENS // sample_tokens)
    prompts = [draw_prompt(rng, level, pictures, side, tasks) for _ in range(samples)]
    rendered = [render(picture, rng) for drawn, _ in prompts for picture in drawn]
    return Batch(pictures, side, [questions for _, questions in prompts], as_patches(rendered))


def easy_batch(rng: Generator, easy: EasyVQA) -> Batch:
    """Pictures of easy-VQA, one a sample."""
    samples = [easy.sample(rng) for _ in range(EASY_TOKENS // EASY_SAMPLE_TOKENS)]
    images = [image for image, _ in samples]
    return Batch(1, SIDE, [questions for _, questions in samples], as_patches(images))


def as_patches(images: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor(np.stack([to_patches(image) for image in images]))
