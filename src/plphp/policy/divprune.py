"""DivPrune (Ranjbar Alvar et al. 2025, arXiv 2503.02175): the most diverse tokens enter layer 0.

    d(i, j) = 1 - cos(x_i, x_j)            of two tokens x of one image, as they enter layer 0
    first   = argmax_i  min_{j != i} d(i, j)
    next    = argmax_i  min_{j chosen} d(i, j), until ceil(budget |V_i| - 1e-6) tokens are chosen
    keep    = all text and the chosen tokens, in every layer

This is the greedy solution of the max-min diversity problem. It needs no attention and no text, so
the choice is the same for every question. The paper chooses among all vision tokens of its models'
single image; here each image is chosen from by itself. The greedy loop runs once for each token
that stays, for all images of a prompt whose sizes are within a factor of two together, and needs
4 M^2 bytes for an image of M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy.hidden import (
    HiddenPolicy,
    HiddenView,
    most_wanted,
    scatter_order,
    stacked,
    together,
    unit,
)

CHOSEN = -1.0  # the distance of a token to itself, below every other
NOWHERE = -0.5  # the distance to a place that no token has: below those to tokens, above CHOSEN


@dataclass(frozen=True)
class DivPrune(HiddenPolicy):
    """A diverse share of each image enters the language model (arXiv 2503.02175).

    budget: the share of each image's tokens that stays, 0 to 1; the paper's default is .098
    min_tokens: the number of tokens that stay of each image at least
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.5
    min_tokens: int = 1

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        scores = torch.zeros(view.spans.shape, device=view.spans.device)
        for group in together(view.spans):
            units = [unit(view.hidden[rows, columns]) for rows, columns in group]
            distances = [1 - tokens @ tokens.transpose(1, 2) for tokens in units]
            chosen = farthest(distances, most_wanted(group, view.spans, quota))
            scatter_order(scores, group, chosen)
        return scores


def farthest(distances: list[Tensor], count: int) -> Tensor:
    """Tokens in the order in which the max-min rule chooses them, (I, count) int64.

    distances: (I_k, M_k, M_k) float32 of the images of each size, changed on their diagonals. The
        choice goes on with places that no token has where an image has fewer than `count`.
    """
    first = []  # before the first choice: the distance to the nearest other token
    for distance in distances:
        distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        first.append(distance.amin(-1))
    nearest, distance = stacked(first, NOWHERE), stacked(distances, NOWHERE)
    # A chosen token is nearest to itself, and not chosen again.
    distance.diagonal(dim1=1, dim2=2).fill_(CHOSEN)
    every = torch.arange(len(distance), device=distance.device)
    chosen = torch.empty(count, len(distance), dtype=torch.int64, device=distance.device)
    for step in range(count):
        best = torch.argmax(nearest, -1, out=chosen[step])
        new = distance[every, best]
        nearest = new if step == 0 else torch.minimum(nearest, new, out=nearest)
    return chosen.T
