"""The steps that policies share: plain functions from tensors to tensors.

Shapes: B rows, H query heads, Hkv KV heads, N prompt columns, L layers. m is the width of tensors
with one entry per image, at least the largest number of images in a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.policy.view import LayerView


def vision_attention(probs: Tensor, spans: Tensor) -> Tensor:
    """gamma (B,) float32: the attention on vision tokens, averaged over query heads.

    probs (B, H, N) float32, spans (B, N) int64. NaN where a row has no vision tokens. Defined in
    PLPHP, arXiv 2502.14504, section 3.
    """
    vision = spans > 0
    gamma = (probs * vision[:, None]).sum(-1).mean(-1)
    return gamma.masked_fill(~vision.any(-1), float("nan"))


def head_scores(probs: Tensor, kv_heads: int, gqa: str = "mean") -> Tensor:
    """Scores (B, Hkv, N): the mean or maximum of probs over the query heads of each KV head.

    probs (B, H, N) float32; gqa "mean" (PLPHP, section 3) or "max".
    """
    batch, heads, length = probs.shape
    grouped = probs.view(batch, kv_heads, heads // kv_heads, length)
    return grouped.amax(2) if gqa == "max" else grouped.mean(2)


def shared_scores(view: LayerView) -> Tensor:
    """Scores (B, Hkv, N), equal for all KV heads: the mean over all query heads."""
    mean = view.over_ranks(view.probs.mean(1, keepdim=True))
    return mean.expand(-1, view.kv_heads, -1)


def window_mean(window: Tensor) -> Tensor:
    """The mean (B, H, N) of the attention (B, H, W, N) of the last W prompt tokens.

    A prompt with fewer than W tokens has zeros in their place, which the mean leaves out. SnapKV,
    arXiv 2404.14469, equation 1.
    """
    tokens = (window[:, 0].sum(-1) > 0).sum(-1).clamp(min=1)
    return window.sum(2) / tokens[:, None, None]


def meet_budget(asked: Tensor, budget: float) -> Tensor:
    """Scale the rates `asked` (L, B) so that their mean over layers is `budget` in each row.

    The result (L, B) is float64, from 0 to 1, and proportional to `asked` below 1. The part of the
    budget that a layer with rate 1 cannot use goes to the other layers. A layer that asks for 0
    gets tokens only when all others keep everything. NaN stays NaN: such a row has no vision
    tokens.
    """
    want = asked.double().nan_to_num(0.0) + 1e-9
    layers = len(want)
    rates = torch.zeros_like(want)
    whole = torch.zeros_like(want, dtype=torch.bool)
    for _ in range(layers):  # each round raises another layer to rate 1, or changes nothing more
        left = budget * layers - whole.sum(0)
        scale = left / want.masked_fill(whole, 0.0).sum(0).clamp(min=1e-12)
        rates = torch.where(whole, 1.0, want * scale)
        whole = whole | (rates >= 1)
    return rates.clamp(0, 1).masked_fill(asked.isnan(), torch.nan)


def image_sizes(spans: Tensor) -> Tensor:
    """The number of tokens of each image, (B, N) int64. Entry i - 1 belongs to the i-th image.

    Entries after the last image are 0. The result has N entries per row because reading the number
    of images would make the host wait for the device.
    """
    sizes = spans.new_zeros(len(spans), spans.shape[1] + 1)
    return sizes.scatter_add_(1, spans.clamp(min=0), torch.ones_like(spans))[:, 1:]


def share(rate: Tensor, sizes: Tensor) -> Tensor:
    """The number of tokens that a rate keeps: min(size, ceil(rate * size - 1e-6)), in float64.

    rate (B,) and sizes (B, m) int64 -> (B, m) int64. Without the 1e-6, rounding errors would make
    .3 of 10 tokens 4.
    """
    kept = torch.ceil(rate.double()[:, None] * sizes.double() - 1e-6)
    return torch.minimum(kept.nan_to_num(0.0).clamp(min=0).long(), sizes)


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """The rank (B, Hkv, N) int64 of each column within its group; 0 is the highest score.

    scores (B, Hkv, N) float32; groups (B, N) or (B, Hkv, N) int64, columns with equal numbers form
    a group. Of equal scores the lower column comes first.
    """
    groups = (groups if groups.dim() == 3 else groups[:, None]).int().expand_as(scores)
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    # A stable sort of the score order by group keeps the score order inside each group. A rank is
    # then the distance from the place where the group begins.
    ordered, by_group = groups.gather(-1, by_score).sort(dim=-1, stable=True)
    order = by_score.gather(-1, by_group)
    # These tensors are as long as the prompt, and a layer is there in full beside them.
    del by_score, by_group
    distance = torch.arange(scores.shape[-1], device=scores.device)
    distance = distance - torch.searchsorted(ordered, ordered, out_int32=True)
    del ordered
    return torch.empty_like(order).scatter_(-1, order, distance)


def select(scores: Tensor, spans: Tensor, quota: Tensor, total: Tensor | None = None) -> Tensor:
    """The keep mask (B, Hkv, N) bool: all text and the vision tokens with the highest scores.

    scores (B, Hkv, N) float32, spans (B, N) int64
    quota: (B, m) int64, tokens to keep of each image
    total: (B,) int64, vision tokens to keep of each row, at least the sum of its quota; the best
        tokens of all images beyond their quota fill it. None: the sum of the quota
    All KV heads of a row keep the same number of tokens, and each KV head selects its own.
    """
    # limit has one entry per span code: 0 for padding (-1), N for text (0), which no rank reaches,
    # and the quota of each image.
    limit = F.pad(F.pad(quota, (1, 0), value=scores.shape[-1]), (1, 0)).gather(1, spans + 1)
    keep = ranks(scores, spans) < limit[:, None]
    if total is None:
        return keep
    rest = (spans > 0)[:, None] & ~keep
    more = total - quota.sum(-1)
    return keep | (rest & (ranks(scores, rest.long()) < more[:, None, None]))


def round_up(total: Tensor, spans: Tensor, multiple: int) -> Tensor:
    """Raise the kept vision tokens until the number of *dropped* ones is a multiple of `multiple`.

    A paged cache can then free whole blocks. total (B,) int64, spans (B, N) int64 -> (B,) int64, at
    most the number of vision tokens of the row.
    """
    dropped = ((spans > 0).sum(-1) - total).clamp(min=0)
    return total + dropped % multiple
