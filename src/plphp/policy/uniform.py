"""Uniform top-k: one rate for all layers, one selection for all heads of a layer.

    s[j] = mean_h p[h, j],  keep = of each image i the top min(|V_i|, ceil(budget |V_i| - 1e-6))

The control that any method with layers or heads of its own has to beat at equal bytes. p[h, j] is
the attention of the last prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Uniform(CachePolicy):
    """Top-k by mean attention. budget: the share kept, 0 to 1. Raises ValueError."""

    budget: float = 0.4

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.shared_scores(view), self.budget)
