"""How many vision tokens a KV head may hold in full, so that the device holds what was allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.policy import KeepPlan, Look, steps
from plphp.policy.view import pack

Place = tuple[int, int]  # of a layer among those that park: its number, and how many there are


def affordable(
    budget: float,
    tokens: Tensor,
    unit: int,
    each: float,
    fixed: Tensor,
    least: int,
    place: Place,
) -> Tensor:
    """(B,) int64: of `tokens` (B,), how many a layer can hold in full.

    unit: bytes of a token's key and value in one KV head
    each: bytes that one more token in full costs; fixed: (B,) what is spent anyway
    least: how many at any rate, as far as there are so many: then more is spent
    """
    left = budget * unit * tokens.double() - fixed
    most = torch.floor(dealt(left / each, tokens, place)).long()
    return torch.minimum(most.clamp(min=least), tokens)


def dealt(mean: Tensor, tokens: Tensor, place: Place) -> Tensor:
    """(B,) float64: a layer's part of what the layers hold, `mean` (B,) of `tokens` (B,) each.

        early = ceil(L / 3)                                 layers hold twice as much, up to all:
        first = min(V, 2 L mean / (L + early))              each of the first `early`
        rest  = (L mean - early first) / (L - early)        each of the others

    What an early layer misses is missing in all after it (dev/studies/recall_index.py).
    """
    layer, layers = place
    early = -(-layers // 3)
    first = torch.minimum(tokens.double(), 2 * layers * mean / (layers + early))
    return first if layer < early else (layers * mean - early * first) / (layers - early)


def plan_within(look: Look, most: Tensor) -> KeepPlan:
    """All text and `most` (B,) vision tokens a KV head, the best of every image by its size.

    What a layer's rate would have been does not count.
    """
    sizes = steps.image_sizes(look.spans)
    tokens = sizes.sum(-1)
    quota = most[:, None] * sizes // tokens.clamp(min=1)[:, None]
    keep = steps.select(look.scores, look.spans, quota, most)
    rate = (most.double() / tokens).masked_fill(tokens == 0, torch.nan)
    return pack(keep, look.gamma, rate, look.classes)
