"""Novelty: keep the tokens whose values differ most from the mean of their image. No paper.

    mu[g, i] = mean over j in V_i of v[g, j]                      mean value of image i
    s[g, j]  = || v[g, j] - mu[g, i] ||  for j in V_i             distance of token j from it
    keep     = all text; of each image i for KV head g the top ceil(floor budget |V_i| - 1e-6) by
               s[g, .], then the best of all images up to ceil(budget |V| - 1e-6)

v[g, j] is the value vector of token j in KV head g. Tokens near the mean, such as those of a plain
background, can replace one another. The score does not depend on the attention of any token, so the
selection is not fitted to the first words of an answer or to the first question of a conversation.
KeyDiff (arXiv 2504.15364) drops text tokens near the mean key. docs/accuracy.md compares Novelty
with the other policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plphp._blocks import at_once
from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, flat_look
from plphp.policy.checks import check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Novelty(CachePolicy):
    """Keep the tokens whose values differ most from the mean value of their image.

    budget: the share of vision tokens kept, 0 to 1
    floor: the part of the budget that is reserved for each image, 0 to 1; one ranking over all
        images assigns the rest
    Raises InputError, naming the field, for a value out of range.
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
        """As in the base class: the part reserved for each image (B, m), and the total (B,)."""
        sizes = steps.image_sizes(spans)
        quota = steps.share(rate * self.floor, sizes)
        whole = steps.share(rate, sizes.sum(-1, keepdim=True))[:, 0]
        return quota, torch.maximum(whole, quota.sum(-1))


def novelty(values: Tensor, spans: Tensor, images: int) -> Tensor:
    """The distance of each value from the mean value of its image, (B, Hkv, N) float32.

    values (B, Hkv, N, Dv), spans (B, N) int64. images: the largest number of images in a row. Text
    and padding are treated as one image each; their distances are not used.
    """
    groups = torch.arange(-1, images + 1, device=spans.device)
    total = values.new_zeros(*values.shape[:2], len(groups), values.shape[-1], dtype=torch.float32)
    for full, index in _blocks(values, spans):
        total.scatter_add_(2, index, full)
    sizes = (spans[..., None] == groups).sum(1).clamp(min=1)
    mean = total / sizes[:, None, :, None]
    parts = [(full - mean.gather(2, index)).norm(dim=-1) for full, index in _blocks(values, spans)]
    return torch.cat(parts, -1)


def _blocks(values: Tensor, spans: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The values in float32, and the groups of their tokens in the same shape, a few at a time.

    A layer that is pruned is there in full, and copies of it in float32 would be twice as large.
    """
    numbers = values.shape[:2].numel() * values.shape[3]
    length = at_once(values, numbers)
    of_token = (spans + 1)[:, None, :, None]
    for begin in range(0, values.shape[2], length):
        part = values[:, :, begin : begin + length]
        yield part.float(), of_token[:, :, begin : begin + length].expand(part.shape)
