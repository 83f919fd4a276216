"""Stage V: every vision token must say what its cell holds, in the language model's own words.

Each output of the merger is classified, against the word embeddings, as the glyph and the colour of
its 28-pixel cell. So the vision tower speaks the language model's language before the language
model learns to listen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional

from plphp.demo.boards import COLOUR_NAMES, GLYPHS, Picture, draw_scene, render
from training.batches import as_patches
from training.easy_vqa import SHAPES, SIDE, EasyVQA
from training.optim import MuonAdamW
from training.schedule import Leg
from training.towers import encode_pictures

RATE = 3e-3
CELLS_PER_STEP = 1600
EASY_PER_STEP = 24
EASY_WEIGHT = 0.2
LOG_EVERY = 40


class _Words(nn.Module):
    """The classes of a vision token: words, and learned vectors for "no glyph", "no colour"."""

    def __init__(self, tokenizer: Any, embeddings: nn.Parameter) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.nothing = nn.Parameter(torch.randn(2, embeddings.shape[1]) * 0.06)
        self.glyph_ids, self.colour_ids, self.shape_ids = (
            [tokenizer.encode(f" {word}")[0] for word in words]
            for words in (GLYPHS, COLOUR_NAMES, SHAPES)
        )

    def cell_logits(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Glyph and colour of board cells; the last class of each is an empty cell."""
        glyphs = torch.cat([self.embeddings[self.glyph_ids], self.nothing[:1]])
        colours = torch.cat([self.embeddings[self.colour_ids], self.nothing[1:]])
        glyph_logits, colour_logits = (
            cells @ words.T.to(cells.dtype) for words in (glyphs, colours)
        )
        return glyph_logits.float(), colour_logits.float()

    def easy_logits(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Shape and colour of whole easy-VQA pictures."""
        shapes, colours = self.embeddings[self.shape_ids], self.embeddings[self.colour_ids]
        return pictures @ shapes.T, pictures @ colours.T


def train(model: Any, tokenizer: Any, easy: EasyVQA, leg: Leg) -> None:
    """Train the vision tower and the word embeddings."""
    torch.manual_seed(1)
    rng = np.random.default_rng(leg.seed)
    visual, embeddings = model.model.visual, model.model.language_model.embed_tokens.weight
    words = _Words(tokenizer, embeddings)
    optimizer = MuonAdamW(visual.parameters(), [embeddings, words.nothing], RATE)
    for step in range(leg.steps):
        board_loss, accuracy = _board_loss(visual, words, rng)
        (board_loss + EASY_WEIGHT * _easy_loss(visual, words, easy, rng)).backward()
        optimizer.step(leg.factor(step))
        if (step + 1) % LOG_EVERY == 0 or step + 1 == leg.steps:
            print(f"vision {step + 1}/{leg.steps} {accuracy}", flush=True)


def _board_loss(visual: Any, words: _Words, rng: Generator) -> tuple[Tensor, str]:
    side = int(rng.choice([4, 5, 6, 8]))
    pictures = [_crowded_scene(rng, side) for _ in range(CELLS_PER_STEP // (side * side))]
    patches = as_patches([render(picture, rng) for picture in pictures])
    glyphs, colours = _targets(pictures)
    with torch.autocast("cpu", torch.bfloat16):
        cells = encode_pictures(visual, patches, side).flatten(0, 1)
        glyph_logits, colour_logits = words.cell_logits(cells)
    right = glyph_logits.argmax(1) == glyphs
    full = glyphs < len(GLYPHS)
    colour_right = (colour_logits.argmax(1) == colours)[full].float().mean()
    accuracy = (
        f"glyph {right[full].float().mean():.3f} colour {colour_right:.3f} "
        f"empty {right[~full].float().mean():.3f}"
    )
    return functional.cross_entropy(glyph_logits, glyphs) + functional.cross_entropy(
        colour_logits, colours
    ), accuracy


def _easy_loss(visual: Any, words: _Words, easy: EasyVQA, rng: Generator) -> Tensor:
    """A picture of easy-VQA shows one thing: its strongest features must tell shape and colour."""
    chosen = rng.integers(0, len(easy.pixels), EASY_PER_STEP)
    images = [easy.pixels[i][:, ::-1] if rng.random() < 0.5 else easy.pixels[i] for i in chosen]
    with torch.autocast("cpu", torch.bfloat16):
        features = encode_pictures(visual, as_patches(images), SIDE).float().amax(1)
    shape_logits, colour_logits = words.easy_logits(features)
    shapes, colours = torch.tensor(easy.shapes[chosen]), torch.tensor(easy.colours[chosen])
    return functional.cross_entropy(shape_logits, shapes) + functional.cross_entropy(
        colour_logits, colours
    )


def _crowded_scene(rng: Generator, side: int) -> Picture:
    """More things than a prompt ever shows, so that a step sees many."""
    count = int(side * side * rng.uniform(0.25, 0.7))
    glyphs = rng.integers(0, len(GLYPHS), count)
    colours = rng.integers(0, len(COLOUR_NAMES), count)
    return draw_scene(rng, side, glyphs, colours)


def _targets(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Glyph and colour of every cell, in the order of the vision tokens."""
    side = pictures[0].side
    glyphs = torch.full((len(pictures), side, side), len(GLYPHS))
    colours = torch.full((len(pictures), side, side), len(COLOUR_NAMES))
    for i, picture in enumerate(pictures):
        for (row, column), thing in picture.things.items():
            glyphs[i, row, column] = thing.glyph
            colours[i, row, column] = thing.colour
    return glyphs.flatten(), colours.flatten()
