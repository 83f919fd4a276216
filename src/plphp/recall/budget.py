"""Computes how many vision tokens a KV head may store in full within the budget of recall."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.policy import KeepPlan, Look, steps
from plphp.policy.view import pack

Place = tuple[int, int]  # number of a layer among those that park tokens, from 0, and their count


def affordable_tokens(
    budget: float,
    tokens: Tensor,
    unit: int,
    each: float,
    fixed: Tensor,
    minimum: int,
    place: Place,
) -> Tensor:
    """(B,) int64: how many vision tokens a KV head of a layer may store in full.

    budget: device bytes of vision tokens as a share of those of the full cache, 0 to 1
    tokens: (B,) int64, vision tokens of each row
    unit: bytes of a token's key and value in one KV head
    each: device bytes that one more token in full costs
    fixed: (B,) device bytes without any token in full
    minimum: how many tokens are stored in full even if that exceeds the budget
    place: the layer's place among those that park tokens
    """
    left = budget * unit * tokens.double() - fixed
    count = torch.floor(share_of_layer(left / each, tokens, place)).long()
    return torch.minimum(count.clamp(min=minimum), tokens)


def share_of_layer(mean: Tensor, tokens: Tensor, place: Place) -> Tensor:
    """(B,) float64: the tokens that one layer stores in full, if `mean` is the mean of all layers.

        early = ceil(L / 3)                                 number of early layers
        first = min(V, 2 L mean / (L + early))              tokens of each early layer
        rest  = (L mean - early first) / (L - early)        tokens of each other layer

    The early layers store twice as many as the others, at most all. What an early layer does not
    read is missing in the input of all layers after it (dev/studies/recall_index.py).

    mean: (B,) float64; tokens: (B,) int64, V of each row; place: (layer, L)
    """
    layer, layers = place
    early = -(-layers // 3)
    first = torch.minimum(tokens.double(), 2 * layers * mean / (layers + early))
    return first if layer < early else (layers * mean - early * first) / (layers - early)


def plan_within(look: Look, count: Tensor) -> KeepPlan:
    """A plan that keeps all text and a given number of vision tokens in each KV head.

    look: the scores of the policy. Its rate is not used: the budget takes its place
    count: (B,) int64, vision tokens to keep. Each image gets a part in proportion to its size, and
        keeps the tokens with the highest scores
    """
    sizes = steps.image_sizes(look.spans)
    tokens = sizes.sum(-1)
    quota = count[:, None] * sizes // tokens.clamp(min=1)[:, None]
    keep = steps.select(look.scores, look.spans, quota, count)
    rate = (count.double() / tokens).masked_fill(tokens == 0, torch.nan)
    return pack(keep, look.gamma, rate, look.classes)
