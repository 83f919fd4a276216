"""PLPHP without "per layer": each KV head keeps tokens of its own, at one rate for all layers.

    r_l = budget,  s[g, j] = mean_{h in group g} p[h, j]

An ablation of arXiv 2502.14504. It measures the effect of rates that depend on vision attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, flat_look
from plphp.policy.checks import check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class PLPHPFlat(CachePolicy):
    """Per-head selection at one rate for all layers and images.

    budget: the share of vision tokens kept, 0 to 1
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.head_scores(view.probs, view.kv_heads), self.budget)
