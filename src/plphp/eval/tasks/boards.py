"""Questions about drawn boards, in the phrases that the embedded model was trained on.

A prompt is drawn again until it fits its task. The tasks are as difficult as the unpruned embedded
model can answer (docs/accuracy.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from zlib import crc32

import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.demo.boards import COLOUR_NAMES, GLYPHS, Picture, Thing, draw_scene, render
from plphp.demo.questions import LEVELS, Level, draw_prompt, draw_size
from plphp.eval.sample import Sample
from plphp.inputs import Clip

HARD, MEDIUM = LEVELS[3], LEVELS[2]
MIN_VISION_TOKENS = 100  # the smallest number of vision tokens of a hard prompt
MOST_PICTURES = 12  # the largest number of pictures of a needle prompt; training had at most 6
LONG = 60  # words and marks of a long answer, about as many tokens of the embedded model
LONG_LEVEL = Level((4, 4), (4, 5), (5, 5), (1, 1), (3, 4), 150, 0)

Drawn = tuple[list[Picture], str, str]  # the images, a question, its answer
Make = Callable[[Generator, int], Drawn]  # makes the sample with a given number
Show = Callable[[Picture, Generator], np.ndarray]  # the pixels of a picture, or of its frames


def sampler(
    name: str, make: Make, earlier: str | None = None, show: Show = render
) -> Callable[[int, int], list[Sample]]:
    """The function `draw` of a task, with one stream of random numbers per task and seed."""

    def draw(count: int, seed: int) -> list[Sample]:
        # Training uses single numbers as seeds, so a pair as a seed gives another stream.
        rng = np.random.default_rng([seed, crc32(name.encode())])
        return [_sample(rng, f"{name}-{k}", make(rng, k), earlier, show) for k in range(count)]

    return draw


def _sample(rng: Generator, name: str, drawn: Drawn, earlier: str | None, show: Show) -> Sample:
    pictures, question, answer = drawn
    images = tuple(_shown(show(picture, rng)) for picture in pictures)
    return Sample(name, images, question, (answer,), earlier)


def _shown(pixels: np.ndarray) -> Image.Image | Clip:
    """The image of pixels (H, W, 3) uint8, or the clip of (F, H, W, 3)."""
    if pixels.ndim == 4:
        return tuple(map(Image.fromarray, pixels))
    return Image.fromarray(pixels)


def asked(
    task: str,
    level: Level = HARD,
    fits: Callable[[Sequence[Picture], str, str], bool] = lambda pictures, question, answer: True,
) -> Make:
    """Prompts of a difficulty level with a question of one training task that satisfies `fits`."""

    def make(rng: Generator, number: int) -> Drawn:
        while True:
            count, side = draw_size(rng, level)
            if level is HARD and count * side * side < MIN_VISION_TOKENS:
                continue
            pictures, questions = draw_prompt(rng, level, count, side, [task])
            for found in questions:
                if fits(pictures, found.text, found.answer):
                    return pictures, found.text, found.answer

    return make


def needle(rng: Generator, number: int) -> Drawn:
    """One thing has a colour that no other thing in 1 to 12 pictures has."""
    count = 1 + number % MOST_PICTURES
    colour, where = int(rng.integers(len(COLOUR_NAMES))), int(rng.integers(count))
    others = [c for c in range(len(COLOUR_NAMES)) if c != colour]
    pictures = []
    for i in range(count):
        glyphs = rng.permutation(len(GLYPHS))[:3].tolist()
        colours = rng.permutation(others)[:3].tolist()
        if i == where:
            colours[0] = colour
            thing = Thing(glyphs[0], colour)
        pictures.append(draw_scene(rng, 4, glyphs, colours))
    place = f"picture {where + 1}"
    return (
        pictures,
        f"what is {COLOUR_NAMES[colour]} in {place}?",
        f"the {COLOUR_NAMES[colour]} object in {place} is the {GLYPHS[thing.glyph]}",
    )


def difference(rng: Generator, number: int) -> Drawn:
    """Two images that differ in the colour of one thing, which is asked for in one of them."""
    side, things = int(rng.integers(5, 9)), int(rng.integers(3, 6))
    glyphs = rng.permutation(len(GLYPHS))[:things].tolist()
    colours = rng.permutation(len(COLOUR_NAMES))[: things + 1].tolist()
    first = draw_scene(rng, side, glyphs, colours[:things])
    changed = {
        cell: Thing(thing.glyph, colours[things]) if thing.glyph == glyphs[0] else thing
        for cell, thing in first.things.items()
    }
    asked_of = int(rng.integers(2))
    answer = COLOUR_NAMES[colours[things] if asked_of else colours[0]]
    place = f"{GLYPHS[glyphs[0]]} in picture {asked_of + 1}"
    return (
        [first, Picture(side, changed, "scene")],
        f"what color is the {place}?",
        f"the {place} is {answer}",
    )


def is_grid(pictures: Sequence[Picture], question: str, answer: str) -> bool:
    return " / " in answer


def is_row(pictures: Sequence[Picture], question: str, answer: str) -> bool:
    return " / " not in answer


def is_long(pictures: Sequence[Picture], question: str, answer: str) -> bool:
    return len(re.findall(r"\w+|[^\w\s]", answer)) >= LONG


def is_elsewhere(pictures: Sequence[Picture], question: str, answer: str) -> bool:
    """The first picture can be described, and the question is about another one."""
    return pictures[0].kind == "scene" and "picture 1?" not in question
