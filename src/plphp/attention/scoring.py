"""The last prompt token's attention, computed beside the model's own: one row, never N x N."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # keys converted to float32 at a time, so that scoring needs no second cache


def last_token_probabilities(
    q: Tensor, k: Tensor, valid: Tensor, scale: float, softcap: float | None = None
) -> Tensor:
    """Post-softmax attention (B, H, S) float32 of one query per row (PLPHP, section 3).

    q (B, H, D) after RoPE, k (B, Hkv, S, D) after RoPE, valid (B, S) bool: False for padding.
    Softmax over the valid keys in float32 whatever the model's dtype.
    """
    batch, heads, dim = q.shape
    grouped = q.float().reshape(batch, k.shape[1], heads // k.shape[1], dim) * scale
    parts = torch.split(k, BLOCK, dim=2)
    blocks = [grouped @ part.float().transpose(2, 3) for part in parts]
    logits = torch.cat(blocks, -1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~valid[:, None, None], -torch.inf)
    return logits.softmax(-1).reshape(batch, heads, -1)
