"""Uniform top-k: one rate for all layers, and one selection for all heads of a layer. A control.

    s[j] = mean_h p[h, j],  keep = of each image i the top min(|V_i|, ceil(budget |V_i| - 1e-6))

p[h, j] is the attention of the last prompt token. A policy that treats layers or heads differently
should lose less than this one at equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, flat_look
from plphp.policy.checks import check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Uniform(CachePolicy):
    """Top-k of each image by the mean attention of all heads.

    budget: the share of vision tokens kept, 0 to 1
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4

    def __post_init__(self) -> None:
        check_share("budget", self.budget)

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.shared_scores(view), self.budget)
