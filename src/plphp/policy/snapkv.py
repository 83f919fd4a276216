"""SnapKV (Li et al. 2024, arXiv 2404.14469) for vision tokens: last prompt tokens vote.

    a[h, j] = mean over the last W prompt tokens i of  p_i[h, j]       window attention
    s[g, .] = mean_{h in group g} pool(a[h, .])                       average over `kernel` columns
    keep    = all text, and of V the top ceil(budget |V| - 1e-6) by s[g, .], one ranking per head

SnapKV ranks text as well and always keeps the window. Here text is kept as a whole, so that methods
differ in what they make of the images alone; vision tokens inside the window are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, Scope, check_count, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class SnapKV(CachePolicy):
    """SnapKV over vision tokens.

    budget: the share of vision tokens kept, 0 to 1
    window: how many of the last prompt tokens vote
    kernel: odd width of the pooling, in columns
    Raises ValueError.
    """

    budget: float = 0.4
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"

    def share(self, view: LayerView) -> float:
        """The share that this layer keeps."""
        return self.budget

    def look(self, view: LayerView) -> Look:
        return flat_look(view, self.scores(view), self.share(view))

    def scores(self, view: LayerView) -> Tensor:
        """(B, Hkv, N) float32."""
        assert view.window is not None and view.asked is not None
        inside = torch.zeros_like(view.spans, dtype=torch.bool)
        inside.scatter_(1, view.asked.clamp(min=0), view.asked >= 0)
        inside &= view.spans >= 0  # a row without W tokens names column 0 where it names none
        attention = steps.window_mean(view.window).masked_fill(inside[:, None], 0.0)
        pooled = F.avg_pool1d(attention, self.kernel, stride=1, padding=self.kernel // 2)
        scores = steps.head_scores(pooled, view.kv_heads)
        return scores.masked_fill(inside[:, None], torch.inf)
