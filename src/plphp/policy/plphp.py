"""PLPHP: per-layer, per-head vision token pruning (Meng et al. 2025, arXiv 2502.14504).

    gamma_l   = mean_h sum_{j in V} p[h, j]                      vision attention of layer l
    r_l       = r + delta_r  if gamma_l >= alpha  (attentive)
                r - delta_r  if gamma_l <  beta   (indifferent)
                r            otherwise            (balanced)
    s[g, j]   = mean_{h in group g} p[h, j]                      score of token j for KV head g
    keep      = all text; of each image i the top min(|V_i|, ceil(r_l |V_i| - 1e-6)) by s[g, .]

p[h, j] is the post-softmax attention of the last prompt token in query head h to column j, V the
vision tokens of a prompt, and V_i those of image i. Shapes as in `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.policy import steps
from plphp.policy.base import CachePolicy, Kind, Look, Scope
from plphp.policy.checks import check_choice, check_count, check_share, meant_plain, meant_share
from plphp.policy.view import LayerView

Gqa = Literal["mean", "max"]


@dataclass(frozen=True)
class PLPHP(CachePolicy):
    """The method of the paper (arXiv 2502.14504, section 3), with the paper's defaults.

    r: retention rate of vision-balanced layers
    delta_r: the amount that is added to r for vision-attentive layers and subtracted from it for
        vision-indifferent layers; 0 <= r - delta_r and r + delta_r <= 1
    alpha, beta: thresholds on gamma, the vision attention of a layer; beta <= alpha
    budget: "image" applies the rate to each image, "global" ranks the tokens of all images
        together. A number from 0 to 1 scales the rates of the layers so that this share of all
        vision K/V is kept; the rates are then known after the last layer only, and until then the
        cache holds the whole prompt
    gqa: how the scores of the query heads of one KV head are combined, "mean" (the paper) or "max"
    min_tokens: the least number of tokens kept of each image, or all tokens of a smaller image
    round_to: more tokens are kept until the number of *dropped* vision tokens of a row is a
        multiple of round_to, so that a paged cache can free whole blocks

    Raises InputError, naming the field, for other values.
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
                raise InputError(f"{name} must be a number, got {value!r}{meant_plain(value)}")
            if not abs(value) < 2**63:  # torch compares with no larger integer
                raise InputError(f"{name} must be finite and less than 2**63, got {value!r}")
        if self.delta_r < 0:
            raise InputError(f"delta_r must be at least 0, got {self.delta_r}")
        # 1e-9 tolerates the rounding error of sums such as .7 + .3.
        if self.r - self.delta_r < -1e-9:
            raise InputError(
                f"r - delta_r must be at least 0, got {self.r} - {self.delta_r}: a layer cannot "
                "keep less than nothing; give a smaller delta_r"
            )
        if self.r + self.delta_r > 1 + 1e-9:
            raise InputError(
                f"r + delta_r must be at most 1, got {self.r} + {self.delta_r}: a layer cannot "
                "keep more than all; give a smaller r or delta_r"
            )
        if self.beta > self.alpha:
            raise InputError(
                f"beta must be at most alpha, got {self.beta} > {self.alpha}: give both"
            )
        if isinstance(self.budget, str) and not meant_share(self.budget):
            if self.budget not in get_args(Scope):
                raise InputError(
                    f"budget must be a share from 0 to 1, 'image' or 'global', got {self.budget!r}"
                )
        else:
            check_share("budget", self.budget)
        check_choice("gqa", self.gqa, get_args(Gqa))
        check_count("min_tokens", self.min_tokens, 0)
        check_count("round_to", self.round_to, 1)

    @property
    def kind(self) -> Kind:
        """One of "layers", where the budget is a number, and "layer"."""
        return "layer" if isinstance(self.budget, str) else "layers"

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        """One of "global", where the tokens of all images are ranked together, and "image"."""
        return "global" if self.budget == "global" else "image"

    @property
    def highest_rate(self) -> float:
        """The rate of vision-attentive layers, r + delta_r."""
        return self.r + self.delta_r

    def rate(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The layer class and the retention rate of each row, from gamma (B,) float32.

        Returns classes (B,) int64, an index into LAYER_CLASSES, and rates (B,) float64. A row
        without vision tokens has gamma NaN, class -1 and rate NaN.
        """
        step = (gamma >= self.alpha).long() - (gamma < self.beta).long()
        no_vision = gamma.isnan()
        # The rates are computed: indexing a table of three rates would copy it to the device in
        # every layer, and the host would wait for the copy.
        rates = self.r + self.delta_r * step.double()
        return (1 + step).masked_fill(no_vision, -1), rates.masked_fill(no_vision, torch.nan)

    def look(self, view: LayerView) -> Look:
        """The scores of every KV head, and the rate of the layer's class."""
        gamma = view.over_ranks(steps.vision_attention(view.probs, view.spans))
        classes, rate = self.rate(gamma)
        return Look(self.scores(view), view.spans, rate, gamma, classes)

    def scores(self, view: LayerView) -> Tensor:
        """The score of each column for each KV head, (B, Hkv, N) float32."""
        return steps.head_scores(view.probs, view.kv_heads, self.gqa)


def calibrated(gammas: list[float], budget: float, spread: float = 0.75) -> PLPHP:
    """PLPHP with alpha and beta at the 2/3 and 1/3 quantiles of the observed vision attention.

    gammas: vision attention of layers, as many prompts as you like
    budget: the mean share of vision tokens that these layers keep, 0 to 1
    spread: delta_r / r, 0 to 1; where r + delta_r would be above 1, delta_r is 1 - r
    Raises InputError for a budget or a spread out of range.
    """
    check_share("budget", budget)
    check_share("spread", spread)
    observed = torch.tensor(gammas, dtype=torch.float64)
    beta, alpha = torch.quantile(observed, torch.tensor([1 / 3, 2 / 3]).double()).tolist()
    # Equal gammas can make one class larger than another; r compensates for that.
    tilt = float((observed >= alpha).double().mean() - (observed < beta).double().mean())
    r = budget / (1 + spread * tilt)
    if r * (1 + spread) > 1:
        r = min((budget - tilt) / (1 - tilt), 1.0) if tilt < 1 else budget
    return PLPHP(r=r, delta_r=min(spread * r, 1 - r), alpha=alpha, beta=beta)
