"""The steps that pruning methods share: plain functions from tensors to tensors.

Shapes: B rows, H query heads, Hkv KV heads, N prompt columns, m images (the most in any row).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.policy.view import LayerView


def vision_attention(probs: Tensor, spans: Tensor) -> Tensor:
    """gamma (B,): mean over query heads of the attention mass on vision tokens (PLPHP, section 3).

    probs (B, H, N) float32, spans (B, N). NaN where a row has no vision tokens.
    """
    vision = spans > 0
    gamma = (probs * vision[:, None]).sum(-1).mean(-1)
    return gamma.masked_fill(~vision.any(-1), float("nan"))


def head_scores(probs: Tensor, kv_heads: int, gqa: str = "mean") -> Tensor:
    """Scores (B, Hkv, N) of KV heads: the mean or max over the query heads that read them.

    probs (B, H, N) float32; PLPHP, section 3, takes the mean.
    """
    batch, heads, length = probs.shape
    grouped = probs.view(batch, kv_heads, heads // kv_heads, length)
    return grouped.amax(2) if gqa == "max" else grouped.mean(2)


def shared_scores(view: LayerView) -> Tensor:
    """Scores (B, Hkv, N) that are the same for all heads: the mean over every query head."""
    mean = view.over_ranks(view.probs.mean(1, keepdim=True))
    return mean.expand(-1, view.kv_heads, -1)


def window_mean(window: Tensor) -> Tensor:
    """(B, H, W, N) attention of the last prompt tokens -> (B, H, N) their mean (SnapKV, eq. 1).

    Rows of zeros stand for tokens that a prompt does not have, and do not count.
    """
    tokens = (window[:, 0].sum(-1) > 0).sum(-1).clamp(min=1)
    return window.sum(2) / tokens[:, None, None]


def meet_budget(asked: Tensor, budget: float) -> Tensor:
    """Rates (L, B) in proportion to `asked` (L, B), none above 1, with the mean `budget` per row.

    float64; NaN where a row asks for NaN, because it has no vision tokens. What a layer cannot
    use, because it is whole, goes to the others; layers that ask for 0 get something last.
    """
    want = asked.double().nan_to_num(0.0) + 1e-9
    layers = len(want)
    rates = torch.zeros_like(want)
    whole = torch.zeros_like(want, dtype=torch.bool)
    for _ in range(layers):  # each round fills at least one more layer, or is the last to matter
        left = budget * layers - whole.sum(0)
        scale = left / want.masked_fill(whole, 0.0).sum(0).clamp(min=1e-12)
        rates = torch.where(whole, 1.0, want * scale)
        whole = whole | (rates >= 1)
    return rates.clamp(0, 1).masked_fill(asked.isnan(), torch.nan)


def image_sizes(spans: Tensor) -> Tensor:
    """Tokens of each image (B, m) int64; rows with fewer images end in zeros. One host read: m."""
    images = max(int(spans.max()), 0) if spans.numel() else 0
    ids = torch.arange(1, images + 1, device=spans.device)
    return (spans[..., None] == ids).sum(1)


def share(rate: Tensor, sizes: Tensor) -> Tensor:
    """min(size, ceil(rate * size - 1e-6)) int64 in float64: the tokens that a rate keeps.

    rate (B,) and sizes (B, m) -> (B, m). The 1e-6 keeps .3 * 10 at 3 and not at 4.
    """
    kept = torch.ceil(rate.double()[:, None] * sizes.double() - 1e-6)
    return torch.minimum(kept.nan_to_num(0.0).clamp(min=0).long(), sizes)


def ranks(scores: Tensor, groups: Tensor) -> Tensor:
    """Rank (B, Hkv, N) of each column among the columns of its group, 0 the highest score.

    scores (B, Hkv, N); groups (B, N) or (B, Hkv, N) int64. Ties go to the lower position.
    """
    groups = (groups if groups.dim() == 3 else groups[:, None]).expand_as(scores)
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    # Sorting the score order by group keeps it inside each group: a rank is then the distance to
    # the place where the group begins.
    ordered, by_group = groups.gather(-1, by_score).sort(dim=-1, stable=True)
    order = by_score.gather(-1, by_group)
    place = torch.arange(scores.shape[-1], device=scores.device)
    distance = place - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter_(-1, order, distance)


def select(scores: Tensor, spans: Tensor, quota: Tensor, total: Tensor | None = None) -> Tensor:
    """Keep mask (B, Hkv, N): all text, the best `quota` of each image, then the best of the rest.

    scores (B, Hkv, N), spans (B, N), quota (B, m) tokens per image, total (B,) vision tokens of a
    row, at least the sum of its quota and by default just that. How many tokens are kept is the
    same for all KV heads; which ones is each head's own choice.
    """
    # One column a code: nothing of padding (-1), all of text (0), an image's quota. No rank is N.
    limit = F.pad(F.pad(quota, (1, 0), value=scores.shape[-1]), (1, 0)).gather(1, spans + 1)
    keep = ranks(scores, spans) < limit[:, None]
    if total is None:
        return keep
    rest = (spans > 0)[:, None] & ~keep
    more = total - quota.sum(-1)
    return keep | (rest & (ranks(scores, rest.long()) < more[:, None, None]))


def round_up(total: Tensor, spans: Tensor, multiple: int) -> Tensor:
    """Raise vision totals (B,) until kept length, text included, is a multiple, or all is kept.

    total (B,) int64, spans (B, N) -> (B,) int64, never above a row's vision tokens.
    """
    text, vision = (spans == 0).sum(-1), (spans > 0).sum(-1)
    return torch.minimum(total + -(text + total) % multiple, torch.maximum(vision, total))
