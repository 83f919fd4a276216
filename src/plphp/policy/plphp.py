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
from plphp.policy.view import KeepPlan, LayerView, pack

Budget = Literal["image", "global"]
Gqa = Literal["mean", "max"]


@dataclass(frozen=True)
class PLPHP:
    """The method of the paper (arXiv 2502.14504, section 3), with its defaults.

    r, delta_r: retention rate and its change, 0 <= r - delta_r and r + delta_r <= 1
    alpha, beta: thresholds on vision attention, beta <= alpha
    budget: "image" keeps the rate of every image, "global" ranks all images together
    gqa: how the query heads of a KV head vote, "mean" (the paper) or "max"
    min_tokens: a floor on the kept tokens of each image
    round_to: kept lengths, text included, are raised to a multiple (paged engines)

    Raises ValueError, naming the field, for anything else.
    """

    r: float = 0.4
    delta_r: float = 0.3
    alpha: float = 0.25
    beta: float = 0.1
    budget: Budget = "image"
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
        for name, kinds in (("budget", get_args(Budget)), ("gqa", get_args(Gqa))):
            if getattr(self, name) not in kinds:
                raise ValueError(f"{name} must be one of {kinds}, got {getattr(self, name)!r}")
        for name, least in (("min_tokens", 0), ("round_to", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")

    def rate(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (B,) int64 (index into LAYER_CLASSES) and rates (B,) float64 of gamma (B,).

        Where gamma is NaN, because a row has no vision tokens, -1 and NaN.
        """
        classes = 1 + (gamma >= self.alpha).long() - (gamma < self.beta).long()
        classes = classes.masked_fill(gamma.isnan(), -1)
        levels = [self.r - self.delta_r, self.r, self.r + self.delta_r, float("nan")]
        table = torch.tensor(levels, dtype=torch.float64, device=gamma.device)
        return classes, table[classes]

    def plan(self, view: LayerView) -> KeepPlan:
        """What to keep of one layer. Two host reads: the number of images and the kept length."""
        spans = view.spans
        gamma = view.over_ranks(steps.vision_attention(view.probs, spans))
        classes, rate = self.rate(gamma)
        quota, total = self.counts(rate, spans)
        scores = steps.head_scores(view.probs, view.kv_heads, self.gqa)
        keep = steps.select(scores, spans, quota, total)
        return pack(keep, gamma, rate, classes)

    def counts(self, rate: Tensor, spans: Tensor) -> tuple[Tensor, Tensor | None]:
        """Vision tokens to keep, int64: per image (B, m), and in all (B,) where that is more.

        rate (B,) float64, spans (B, N).
        """
        sizes = steps.image_sizes(spans)
        quota = sizes.clamp(max=self.min_tokens)
        if self.budget == "image":
            quota = torch.maximum(quota, steps.share(rate, sizes))
            if self.round_to == 1:
                return quota, None
        whole = steps.share(rate, sizes.sum(-1, keepdim=True))[:, 0]
        total = quota.sum(-1) if self.budget == "image" else torch.maximum(whole, quota.sum(-1))
        return quota, steps.round_up(total, spans, self.round_to)
