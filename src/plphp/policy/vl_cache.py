"""VL-Cache (Tu et al. 2024, arXiv 2410.23317) for vision tokens: sparse layers keep fewer tokens.

    A_l        attention of the post-vision prompt tokens (those after the last image), per head
    sparsity_l = share of the entries of A_l (keys at or before the query) that are below
                 threshold * the largest entry of their row, mean over heads
    r_l        = budget * L * (1 - sparsity_l) / sum_k (1 - sparsity_k), at most 1, mean = budget
    s[g, j]    = mean_{h in group g} sum over post-vision queries i of A_l[h, i, j]
    keep       = all text, and of V the top ceil(r_l |V| - 1e-6) by s[g, .], one ranking per head

The paper clips the rate of a layer, and keeps recent text only. Here the part of the budget that a
layer with rate 1 cannot use goes to the other layers, so that the budget is met, and all text is
kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Kind, Look, Scope, flat_look
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class VLCache(CachePolicy):
    """Layer rates from the sparsity of attention, planned after the last layer (arXiv 2410.23317).

    budget: the share of vision K/V kept over all layers, 0 to 1
    threshold: an attention entry below this share of the largest entry of its query counts as
        zero, 0 to 1
    window: the number of last prompt tokens whose attention is read; of these, the tokens after
        the last vision token count, and always the last token
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4
    threshold: float = 0.01
    window: int = 64

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_share("threshold", self.threshold)
        check_count("window", self.window, 1)

    @property
    def kind(self) -> Kind:
        return "layers"

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"

    def look(self, view: LayerView) -> Look:
        assert view.window is not None and view.asked is not None
        asks = post_vision(view.spans, view.asked)
        attention = view.window * asks[:, None, :, None]
        scores = steps.head_scores(attention.sum(2), view.kv_heads)
        dense = view.over_ranks(1 - self.sparsity(view, attention, asks))
        return replace(flat_look(view, scores, 1.0), rate=dense.double())

    def sparsity(self, view: LayerView, attention: Tensor, asks: Tensor) -> Tensor:
        """The share of attention entries that count as zero, (B,) float32, 0 to 1.

        attention (B, H, W, N) float32; asks (B, W) bool selects the queries that count.
        """
        assert view.asked is not None
        columns = torch.arange(view.spans.shape[1], device=view.spans.device)
        seen = (columns <= view.asked[..., None]) & (view.spans >= 0)[:, None] & asks[..., None]
        least = self.threshold * attention.amax(-1, keepdim=True)
        small = ((attention < least) & seen[:, None]).sum((2, 3)).float()
        return (small / seen.sum((1, 2))[:, None].clamp(min=1)).mean(-1)


def post_vision(spans: Tensor, asked: Tensor) -> Tensor:
    """Which queries come after the last vision token, (B, W) bool.

    spans (B, N) int64; asked (B, W) int64, the columns of the queries. The last prompt token is
    always included, because a prompt may end with an image.
    """
    columns = torch.arange(spans.shape[1], device=spans.device)
    last = torch.where(spans > 0, columns, -1).amax(-1, keepdim=True)
    after = (asked > last) & (asked >= 0)
    after[:, -1] = True
    return after
