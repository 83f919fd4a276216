"""Attention over a pruned cache through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention output (B, H, T, Dv); arguments as in `reference.attend`.

    The G query heads of a KV head become G * T queries of it: keys and values are read once and
    never repeated.
    """
    batch, heads, queries, dim = q.shape
    groups = heads // k.shape[1]
    packed = q.reshape(batch, k.shape[1], groups * queries, dim)
    if visible is not None and visible.shape[2] > 1:
        visible = visible.repeat(1, 1, groups, 1)
    out = F.scaled_dot_product_attention(packed, k, v, attn_mask=visible, scale=scale)
    return out.reshape(batch, heads, queries, -1)
