"""Attention and its probabilities as plain formulas in float32, which the fast paths must equal.

Shapes: q (B, H, T, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv); query head h reads KV head
h // (H / Hkv). `visible` is bool and broadcasts to (B, Hkv, T, S), True where a query attends to a
key; None if each attends to every key. `scale` multiplies the logits; with `softcap` logits x
become softcap * tanh(x / softcap).
"""

from __future__ import annotations

import torch
from torch import Tensor


def probabilities(
    q: Tensor, k: Tensor, visible: Tensor | None, scale: float, softcap: float | None = None
) -> Tensor:
    """softmax(scale q k^T) over the visible keys, float32 (B, H, T, S)."""
    batch, heads, queries, dim = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, queries, dim)
    logits = scale * torch.einsum("bghtd,bgsd->bghts", grouped, k.float())
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        logits = logits.masked_fill(~visible[:, :, None], -torch.inf)
    return logits.softmax(-1).reshape(batch, heads, queries, -1)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv) in q's dtype."""
    batch, heads, queries, _ = q.shape
    p = probabilities(q, k, visible, scale, softcap)
    p = p.reshape(batch, k.shape[1], -1, queries, k.shape[2])
    out = torch.einsum("bghts,bgsd->bghtd", p, v.float())
    return out.reshape(batch, heads, queries, -1).to(q.dtype)
