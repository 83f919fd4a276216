"""How far the next-token distributions of two models are apart."""

from __future__ import annotations

from torch import Tensor


def kl(full: Tensor, pruned: Tensor) -> Tensor:
    """KL(full || pruned) in nats (...), from log-probabilities (..., vocabulary), float32."""
    # Rounding errors can make the sum slightly negative where both distributions are equal.
    return (full.exp() * (full - pruned)).sum(-1).clamp(min=0)
