"""Attention probabilities of the last prompt tokens. No N x N matrix is ever computed."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # how many keys are converted to float32 at a time: all at once would double the cache


def window_probabilities(
    q: Tensor, k: Tensor, visible: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention (B, H, W, S) float32 of a few queries per row.

    q, k: (B, H, W, D) and (B, Hkv, S, D), both after RoPE
    visible: (B, W, S) bool, the keys to which each query attends
    scale: factor of the logits
    softcap: logits x become softcap * tanh(x / softcap); None for no soft cap

    The softmax is in float32, whatever the model's dtype. The probabilities of a query that attends
    to no key are 0.
    """
    batch, heads, queries, dim = q.shape
    grouped = q.float().reshape(batch, k.shape[1], -1, dim) * scale  # G * W queries of a KV head
    parts = [grouped @ part.float().transpose(2, 3) for part in torch.split(k, BLOCK, dim=2)]
    logits = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
    del parts  # with many queries, each of these tensors is larger than the keys
    logits = logits.view(batch, heads, queries, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~visible[:, None]
    probs = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
    del logits
    return probs.masked_fill(hidden.all(-1, keepdim=True), 0.0)


def last_token_probabilities(
    q: Tensor, k: Tensor, valid: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention (B, H, S) float32 of one query per row (PLPHP, section 3).

    q: (B, H, D) after RoPE
    valid: (B, S) bool, False for padding
    The other arguments are those of `window_probabilities`.
    """
    return window_probabilities(q[:, :, None], k, valid[:, None], scale, softcap)[:, :, 0]
