"""Draws prompts whose things cover several vision tokens, so that tokens are redundant.

A regime says how many tokens a thing covers: one in ``dense``, 2 x 2 in ``redundant-4``, and 4 x 4
in ``redundant-16``. The backgrounds are photographs, except in the regimes that end in ``-plain``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from plphp.demo.boards import CELL, Picture
from plphp.demo.painting import Canvas, Look, paint
from plphp.demo.photographs import HELD_OUT
from plphp.demo.questions import Level, Question, Range, ask_all, draw_boards
from plphp.demo.wording import CHAT, LEADS, SYSTEM, TAILS

LEAST_TOKENS = 16  # the image processor enlarges a picture with fewer vision tokens
LONGEST_SIDE = 40  # the longest side of a picture, in vision tokens
LEAST_CELLS = 4  # the smallest number of cells of a picture
MANY_PICTURES = 6  # with more pictures each one has fewer things, because there are too few letters
LEVEL = Level((1, 8), (2, 40), (2, 5), (1, 2), (3, 6), 4000, 240)


@dataclass(frozen=True)
class Regime:
    """The distribution of prompts.

    scales: a thing covers scale x scale vision tokens
    pictures: range of the number of pictures
    tokens: range of the approximate number of vision tokens, with a uniform logarithm
    aligned_share: share of pictures whose cells begin where vision tokens begin
    dense_aligned_share: the same for scale 1, where a token otherwise shows half of a thing
    reworded: share of questions in other words than the first wording
    chatty: share of prompts with text that is not about the answer
    """

    look: Look
    scales: tuple[int, ...] = (1, 2, 3, 4)
    pictures: Range = (1, 8)
    tokens: Range = (50, 1300)
    aligned_share: float = 0.3
    dense_aligned_share: float = 0.85
    reworded: float = 0.5
    chatty: float = 0.5


class Preamble(NamedTuple):
    """The text before the pictures: a system prompt, earlier turns, and an introduction."""

    system: str = ""
    turns: tuple[tuple[str, str], ...] = ()
    lead: str = ""

    def messages(self, pictures: int, question: str) -> list[dict[str, object]]:
        """The messages of a prompt, in the form that chat templates take."""
        out: list[dict[str, object]] = []
        if self.system:
            out.append({"role": "system", "content": self.system})
        for said, answered in self.turns:
            out.append({"role": "user", "content": said})
            out.append({"role": "assistant", "content": answered})
        content: list[dict[str, str]] = [{"type": "text", "text": self.lead}] if self.lead else []
        content += [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        return [*out, {"role": "user", "content": content}]


SILENCE = Preamble()


@dataclass(frozen=True)
class Frame:
    """What the samples of a batch have in common: the sizes of the pictures, and the preamble."""

    sizes: tuple[tuple[int, int], ...]  # (high, wide) of each picture, in vision tokens
    scale: int
    preamble: Preamble = SILENCE

    @property
    def tokens(self) -> int:
        return sum(high * wide for high, wide in self.sizes)


class Drawn(NamedTuple):
    """One prompt: the boards, the pixels and the maps of its pictures, and the questions."""

    pictures: list[Picture]
    images: list[np.ndarray]
    maps: list[np.ndarray]
    questions: list[Question]


PHOTOGRAPHS = Look(HELD_OUT, shading_share=0.3, clutter_share=0.3, occlusion_share=0.1)
PLAIN = Look()
_HELD_OUT = Regime(
    PHOTOGRAPHS,
    pictures=(2, 6),
    tokens=(150, 1300),
    dense_aligned_share=1.0,
    reworded=0.0,
    chatty=0.0,
)
REGIMES = {
    name + suffix: replace(_HELD_OUT, scales=(scale,), look=look)
    for name, scale in (("dense", 1), ("redundant-4", 2), ("redundant-16", 4))
    for suffix, look in (("", PHOTOGRAPHS), ("-plain", PLAIN))
}
REGIMES["long"] = replace(_HELD_OUT, scales=(2, 3, 4), pictures=(4, 8), tokens=(2000, 4000))


def draw_frame(rng: Generator, regime: Regime) -> Frame:
    """A frame with sizes of pictures that fit the regime."""
    scale = int(rng.choice(regime.scales))
    while True:
        count = int(rng.integers(regime.pictures[0], regime.pictures[1] + 1))
        least, most = regime.tokens
        least = max(least, count * max(LEAST_TOKENS, LEAST_CELLS * scale**2))
        if least > most:
            continue
        share = np.exp(rng.uniform(np.log(least), np.log(most))) / count
        alike = rng.random() < 0.7
        found = [_size(rng, share, scale) for _ in range(1 if alike else count)]
        sizes = tuple(found * count if alike else found)
        if all(_fits(size, scale) for size in sizes):
            return Frame(sizes, scale, draw_preamble(rng, regime.chatty))


def draw_preamble(rng: Generator, chatty: float) -> Preamble:
    """Text that is not about the answer, with the probability ``chatty``; otherwise no text."""
    if rng.random() >= chatty:
        return SILENCE
    system = SYSTEM[int(rng.integers(len(SYSTEM)))] if rng.random() < 0.6 else ""
    order = rng.permutation(len(CHAT))[: int(rng.choice([0, 1, 2], p=[0.5, 0.3, 0.2]))]
    lead = LEADS[int(rng.integers(len(LEADS)))]
    return Preamble(system, tuple(CHAT[int(i)] for i in order), lead)


def draw(rng: Generator, regime: Regime, frame: Frame, tasks: Sequence[str]) -> Drawn:
    """A prompt with the sizes of a frame, and a question for each task that its pictures allow."""
    aligned = regime.dense_aligned_share if frame.scale == 1 else regime.aligned_share
    canvases = [_canvas(rng, size, frame.scale, aligned) for size in frame.sizes]
    many = len(canvases) > MANY_PICTURES
    level = replace(LEVEL, things=(2, 4)) if many else LEVEL
    pictures = draw_boards(rng, level, [canvas.grid for canvas in canvases])
    painted = [paint(p, c, regime.look, rng) for p, c in zip(pictures, canvases, strict=True)]
    questions = ask_all(rng, pictures, tasks, regime.reworded)
    if frame.preamble != SILENCE:
        questions = [_with_tail(rng, question) for question in questions]
    images, maps = ([pair[i] for pair in painted] for i in (0, 1))
    return Drawn(pictures, images, maps, questions)


def _size(rng: Generator, tokens: float, scale: int) -> tuple[int, int]:
    """The height and width of a picture, at least a cell, with an aspect from 2:5 to 5:2."""
    aspect = float(np.exp(rng.uniform(-0.9, 0.9)))
    high = max(scale, round((tokens * aspect) ** 0.5))
    return high, max(scale, round(tokens / high))


def _fits(size: tuple[int, int], scale: int) -> bool:
    high, wide = size
    cells = (high // scale) * (wide // scale)
    return max(size) <= LONGEST_SIDE and high * wide >= LEAST_TOKENS and cells >= LEAST_CELLS


def _canvas(rng: Generator, size: tuple[int, int], scale: int, aligned_share: float) -> Canvas:
    """A canvas with the place of the board, which is aligned if it has too few cells otherwise."""
    high, wide = size
    if rng.random() >= aligned_share:
        rest = [(edge % scale) * CELL or CELL - 1 for edge in size]
        top, left = (int(rng.integers(1, room + 1)) for room in rest)
        canvas = Canvas(high, wide, scale, top, left)
        if canvas.grid[0] * canvas.grid[1] >= LEAST_CELLS:
            return canvas
    top, left = (int(rng.integers(edge % scale + 1)) * CELL for edge in size)
    return Canvas(high, wide, scale, top, left)


def _with_tail(rng: Generator, question: Question) -> Question:
    tail = TAILS[int(rng.integers(len(TAILS)))]
    return question._replace(text=question.text + tail)
