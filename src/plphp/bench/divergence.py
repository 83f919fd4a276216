"""The divergence of two models' next-token distributions."""

from __future__ import annotations

from torch import Tensor


def kl(full: Tensor, pruned: Tensor) -> Tensor:
    """KL(full || pruned) in nats, shape (...).

    full, pruned: log-probabilities (..., vocabulary) float32
    """
    # Rounding errors can make the sum slightly negative where both distributions are equal.
    return (full.exp() * (full - pruned)).sum(-1).clamp(min=0)
