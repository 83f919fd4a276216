"""Novelty: keep what says something that the rest of its image does not. Ours; no paper.

    mu[g, i] = mean over j in V_i of v[g, j]                      what image i says on the average
    s[g, j]  = || v[g, j] - mu[g, i] ||  for j in V_i             how far token j is from that
    keep     = all text; of each image i for KV head g the top ceil(floor budget |V_i| - 1e-6) by
               s[g, .], then the best of all images up to ceil(budget |V| - 1e-6)

v[g, j] is the value that KV head g would read from token j. Tokens near the mean stand in for one
another: sky, paper, wall. No attention is looked at, so nothing is chosen for the first words of an
answer or for the first question of a conversation. KeyDiff (arXiv 2504.15364) drops what is near
the mean key of a text; docs/accuracy.md has what this one keeps and loses beside other methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Novelty(CachePolicy):
    """Tokens whose values differ most from their image's mean.

    budget: the share of vision tokens kept, 0 to 1
    floor: which part of the budget every image gets for itself, 0 to 1; images compete for the rest
    Raises ValueError.
    """

    budget: float = 0.4
    floor: float = 0.5

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_share("floor", self.floor)

    def look(self, view: LayerView) -> Look:
        assert view.values is not None
        return flat_look(view, novelty(view.values, view.spans, view.most_images()), self.budget)

    def counts(self, rate: Tensor, spans: Tensor) -> tuple[Tensor, Tensor | None]:
        """As in the base: here a part for each image (B, m), and all that is kept (B,)."""
        sizes = steps.image_sizes(spans)
        quota = steps.share(rate * self.floor, sizes)
        whole = steps.share(rate, sizes.sum(-1, keepdim=True))[:, 0]
        return quota, torch.maximum(whole, quota.sum(-1))


def novelty(values: Tensor, spans: Tensor, images: int) -> Tensor:
    """(B, Hkv, N) float32: distance of values (B, Hkv, N, Dv) from the mean of their image.

    spans (B, N) of up to `images` images a row; text and padding are one more each, which nothing
    ranks.
    """
    index = (spans + 1)[:, None, :, None].expand(values.shape)
    groups = torch.arange(-1, images + 1, device=spans.device)
    full = values.float()
    total = full.new_zeros(*values.shape[:2], len(groups), values.shape[-1])
    total.scatter_add_(2, index, full)
    sizes = (spans[..., None] == groups).sum(1).clamp(min=1)
    mean = total / sizes[:, None, :, None]
    distance: Tensor = (full - mean.gather(2, index)).norm(dim=-1)
    return distance
