"""Stage V: the vision tower learns to name what each vision token shows.

Each output of the merger is classified as the glyph and the colour of the thing of which the token
shows a part. The classes are the language model's word embeddings, so that the language model can
read vision tokens when stage J begins. Each token of a thing learns to name the whole thing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional

from plphp.demo.boards import COLOUR_NAMES, GLYPHS
from training.batches import as_patches, crowded_views, targets
from training.easy_vqa import SHAPES, SIDE, EasyVQA
from training.packing import IGNORED
from training.schedule import Phase
from training.towers import encode_pictures

EASY_PER_STEP = 24
EASY_WEIGHT = 0.2


class Words(nn.Module):
    """The classes of vision tokens: words, and learned vectors for "no glyph" and "no colour"."""

    def __init__(self, tokenizer: Any, embeddings: nn.Parameter) -> None:
        super().__init__()
        self.embeddings = [embeddings]  # in a list, so that it is not a parameter of this module
        self.nothing = nn.Parameter(torch.randn(2, embeddings.shape[1]) * 0.06)
        self.glyph_ids, self.colour_ids, self.shape_ids = (
            [tokenizer.encode(f" {word}")[0] for word in words]
            for words in (GLYPHS, COLOUR_NAMES, SHAPES)
        )

    def loss(self, features: Tensor, maps: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of vision tokens [T, d], and the shares of right classes.

        maps: [N, T / N, 2], the glyph and the colour that each token shows
        """
        glyphs, colours = targets(maps, IGNORED)
        words = self.embeddings[0]
        classes = [torch.cat([words[self.glyph_ids], self.nothing[:1]])]
        classes.append(torch.cat([words[self.colour_ids], self.nothing[1:]]))
        glyph_logits, colour_logits = ((features @ c.T).float() for c in classes)
        right = glyph_logits.argmax(1) == glyphs
        full, empty = (glyphs >= 0) & (glyphs < len(GLYPHS)), glyphs == len(GLYPHS)
        seen = {"glyph": float(right[full].float().mean())}
        seen["colour"] = float((colour_logits.argmax(1) == colours)[full].float().mean())
        if empty.any():
            seen["empty"] = float(right[empty].float().mean())
        loss = functional.cross_entropy(glyph_logits, glyphs, ignore_index=IGNORED)
        loss = loss + functional.cross_entropy(colour_logits, colours, ignore_index=IGNORED)
        return loss, seen

    def easy_loss(self, visual: Any, easy: EasyVQA, rng: Generator) -> Tensor:
        """The loss of pictures of easy-VQA: the maximum of the features gives shape and colour."""
        chosen = rng.integers(0, len(easy.pixels), EASY_PER_STEP)
        images = [easy.pixels[i][:, :: 1 if rng.random() < 0.5 else -1] for i in chosen]
        features = encode_pictures(visual, as_patches(images), SIDE, SIDE).float().amax(1)
        words = self.embeddings[0]
        shapes, colours = torch.tensor(easy.shapes[chosen]), torch.tensor(easy.colours[chosen])
        loss = functional.cross_entropy(features @ words[self.shape_ids].T, shapes)
        return loss + functional.cross_entropy(features @ words[self.colour_ids].T, colours)


def learn(
    visual: Any, words: Words, easy: EasyVQA, phase: Phase, rng: Generator
) -> tuple[float, dict[str, float]]:
    """Compute the gradients of one step. Returns the loss, and the shares of right classes."""
    loss, seen = crowd_loss(visual, words, phase, phase.budget, rng)
    if rng.random() < phase.easy_share:
        loss = loss + EASY_WEIGHT * words.easy_loss(visual, easy, rng)
    loss.backward()
    return loss.item(), seen


def crowd_loss(
    visual: Any, words: Words, phase: Phase, budget: int, rng: Generator
) -> tuple[Tensor, dict[str, float]]:
    """The loss of pictures with many things, and the shares of right classes by name."""
    scale = int(rng.choice(phase.regime.scales))
    views, maps = crowded_views(rng, phase.regime.look, scale, budget)
    features = encode_pictures(visual, views.patches, views.high, views.wide)
    loss, seen = words.loss(features.flatten(0, 1), maps)
    return loss, {f"{name}@{scale}": value for name, value in seen.items()}


def nan_free(seen: dict[str, float]) -> dict[str, float]:
    """The values that are not NaN. NaN stands for a class that no token had."""
    return {name: value for name, value in seen.items() if not np.isnan(value)}
