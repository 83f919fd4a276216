"""How many vision tokens a KV head may hold in full, so that the device holds what was allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.policy import KeepPlan, Look, steps
from plphp.policy.view import pack


def affordable(
    budget: float,
    tokens: Tensor,
    unit: int,
    each: float,
    fixed: Tensor,
    least: int,
) -> Tensor:
    """(B,) int64: of `tokens` (B,), how many can be held in full.

    unit: bytes of a token's key and value in one KV head
    each: bytes that one more token in full costs; fixed: (B,) what is spent anyway
    least: how many at any rate, as far as there are so many: then more is spent
    """
    left = budget * unit * tokens.double() - fixed
    return torch.minimum(torch.floor(left / each).long().clamp(min=least), tokens)


def plan_within(look: Look, most: Tensor) -> KeepPlan:
    """All text and `most` (B,) vision tokens a KV head, the best of every image by its size.

    What a layer's rate would have been does not count: the budget is every layer's.
    """
    sizes = steps.image_sizes(look.spans)
    tokens = sizes.sum(-1)
    quota = most[:, None] * sizes // tokens.clamp(min=1)[:, None]
    keep = steps.select(look.scores, look.spans, quota, most)
    rate = (most.double() / tokens).masked_fill(tokens == 0, torch.nan)
    return pack(keep, look.gamma, rate, look.classes)
