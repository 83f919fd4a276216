"""PLPHP: per-layer, per-head vision token pruning (Meng et al. 2025, arXiv 2502.14504).

    gamma_l   = mean_h sum_{j in V} p[h, j]                      how much layer l looks at images
    r_l       = r + delta_r  if gamma_l >= alpha  (attentive)
                r - delta_r  if gamma_l <  beta   (indifferent)
                r            otherwise            (balanced)
    s[g, j]   = mean_{h in group g} p[h, j]                      score of token j for KV head g
    keep      = all text; of each image i the top min(|V_i|, ceil(r_l |V_i| - 1e-6)) by s[g, .]

p[h, j] is the post-softmax attention of the last prompt token. Shapes as in `steps`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.base import (
    CachePolicy,
    Kind,
    Look,
    Scope,
    check_choice,
    check_count,
    check_share,
)
from plphp.policy.view import LayerView

Gqa = Literal["mean", "max"]


@dataclass(frozen=True)
class PLPHP(CachePolicy):
    """The method of the paper (arXiv 2502.14504, section 3), with its defaults.

    r, delta_r: retention rate and its change, 0 <= r - delta_r and r + delta_r <= 1
    alpha, beta: thresholds on vision attention, beta <= alpha
    budget: "image" keeps the rate of every image, "global" ranks all images together; a number
        scales the layers' rates so that this share of all vision K/V is kept, which can only be
        known after the last layer: the whole prompt's cache is alive until then
    gqa: how the query heads of a KV head vote, "mean" (the paper) or "max"
    min_tokens: a floor on the kept tokens of each image
    round_to: more is kept until the number of dropped (not of kept) vision tokens of a layer is a
        multiple of it, so that whole blocks of a paged cache become free

    Raises ValueError, naming the field, for anything else.
    """

    r: float = 0.4
    delta_r: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    budget: Scope | float = "image"
    gqa: Gqa = "mean"
    min_tokens: int = 0
    round_to: int = 1

    def __post_init__(self) -> None:
        for name in ("r", "delta_r", "alpha", "beta"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, got {value!r}")
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value!r}")
        if self.delta_r < 0:
            raise ValueError(f"delta_r must be at least 0, got {self.delta_r}")
        # 1e-9 forgives the last bit of sums such as .7 + .3, not a mistake.
        if self.r - self.delta_r < -1e-9:
            raise ValueError(f"r - delta_r must be at least 0, got {self.r} - {self.delta_r}")
        if self.r + self.delta_r > 1 + 1e-9:
            raise ValueError(f"r + delta_r must be at most 1, got {self.r} + {self.delta_r}")
        if self.beta > self.alpha:
            raise ValueError(f"beta must be at most alpha, got {self.beta} > {self.alpha}")
        if isinstance(self.budget, str):
            check_choice("budget", self.budget, get_args(Scope))
        else:
            check_share("budget", self.budget)
        check_choice("gqa", self.gqa, get_args(Gqa))
        check_count("min_tokens", self.min_tokens, 0)
        check_count("round_to", self.round_to, 1)

    @property
    def kind(self) -> Kind:
        """All layers together where the budget is a number."""
        return "layer" if isinstance(self.budget, str) else "layers"

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """Whether images are ranked together."""
        return "global" if self.budget == "global" else "image"

    def rate(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (B,) int64 (index into LAYER_CLASSES) and rates (B,) float64 of gamma (B,).

        Where gamma is NaN, because a row has no vision tokens, -1 and NaN.
        """
        step = (gamma >= self.alpha).long() - (gamma < self.beta).long()
        unseen = gamma.isnan()
        # A table of the three rates would be copied to the device, and wait for it, in every layer.
        rates = self.r + self.delta_r * step.double()
        return (1 + step).masked_fill(unseen, -1), rates.masked_fill(unseen, torch.nan)

    def look(self, view: LayerView) -> Look:
        """Scores of every KV head, and the rate of the layer's class."""
        gamma = view.over_ranks(steps.vision_attention(view.probs, view.spans))
        classes, rate = self.rate(gamma)
        return Look(self.scores(view), view.spans, rate, gamma, classes)

    def scores(self, view: LayerView) -> Tensor:
        """(B, Hkv, N) float32: what every KV head reads from every column."""
        return steps.head_scores(view.probs, view.kv_heads, self.gqa)


def calibrated(gammas: list[float], budget: float, spread: float = 0.75) -> PLPHP:
    """PLPHP with alpha and beta at the 2/3 and 1/3 quantiles of observed vision attention.

    r and delta_r = spread * r are such that these layers would keep `budget` on the average; where
    r + delta_r would pass 1, delta_r = 1 - r.
    """
    check_share("budget", budget)
    check_share("spread", spread)
    observed = torch.tensor(gammas, dtype=torch.float64)
    beta, alpha = torch.quantile(observed, torch.tensor([1 / 3, 2 / 3]).double()).tolist()
    # Ties may make one class larger than another: r makes up for it.
    tilt = float((observed >= alpha).double().mean() - (observed < beta).double().mean())
    r = budget / (1 + spread * tilt)
    if r * (1 + spread) > 1:
        r = min((budget - tilt) / (1 - tilt), 1.0) if tilt < 1 else budget
    return PLPHP(r=r, delta_r=min(spread * r, 1 - r), alpha=alpha, beta=beta)
