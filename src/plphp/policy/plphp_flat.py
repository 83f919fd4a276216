"""PLPHP without "per layer": every head keeps its own tokens, all layers at one rate.

    r_l = budget,  s[g, j] = mean_{h in group g} p[h, j]

An ablation of arXiv 2502.14504: what do rates that follow the vision attention bring?
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class PLPHPFlat(CachePolicy):
    """Per-head selection at one rate. budget: the share kept, 0 to 1. Raises ValueError."""

    budget: float = 0.4

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.head_scores(view.probs, view.kv_heads), self.budget)
