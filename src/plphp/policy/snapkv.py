"""SnapKV (Li et al. 2024, arXiv 2404.14469) for vision tokens: scores from the last prompt tokens.

    a[h, j] = mean over the last W prompt tokens i of  p_i[h, j]       window attention
    s[g, .] = mean_{h in group g} pool(a[h, .])                       average over `kernel` columns
    keep    = all text, and of V the top ceil(budget |V| - 1e-6) by s[g, .], one ranking per head

SnapKV itself ranks text too, and always keeps the window. Here all text is kept, so that policies
differ in their vision tokens only. Vision tokens inside the window are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.errors import InputError
from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, Scope, flat_look
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """SnapKV restricted to vision tokens (arXiv 2404.14469).

    budget: the share of vision tokens kept, 0 to 1
    window: the number of last prompt tokens whose attention is averaged, at least 1
    kernel: width of the average pooling over columns, odd
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise InputError(f"kernel must be odd, got {self.kernel}")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"

    def share(self, view: LayerView) -> float:
        """The share of vision tokens that this layer keeps."""
        return self.budget

    def look(self, view: LayerView) -> Look:
        return flat_look(view, self.scores(view), self.share(view))

    def scores(self, view: LayerView) -> Tensor:
        """The score of each column for each KV head, (B, Hkv, N) float32; inf inside the window."""
        assert view.window is not None and view.asked is not None
        inside = torch.zeros_like(view.spans, dtype=torch.bool)
        inside.scatter_(1, view.asked.clamp(min=0), view.asked >= 0)
        # A row with fewer than W tokens has -1 in `asked`, which clamp turned into column 0.
        inside &= view.spans >= 0
        attention = steps.window_mean(view.window).masked_fill(inside[:, None], 0.0)
        pooled = F.avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        scores = steps.head_scores(pooled, view.kv_heads)
        return scores.masked_fill(inside[:, None], torch.inf)
