"""The attention for training: PyTorch's function in float32, and a faster one in bfloat16.

On a CPU ``scaled_dot_product_attention`` multiplies small tiles in float32 in every dtype. On a
processor with bfloat16 units whole matrix products are faster: with heads of size 32 and 800
tokens, forward and backward together take .4 of the time. They need more memory, because they store
one probability for each pair of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """The attention output [B, H, Q, d] for query [B, H, Q, d], key and value [B, H, L, d].

    mask: broadcasts to [B, H, Q, L]; True where a query attends to a key
    causal: each query attends to the keys up to its own position; Q must be L

    Under an autocast to bfloat16 all products are computed in bfloat16.
    """
    if not torch.is_autocast_enabled("cpu"):
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=causal
        )
    if causal:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    query, key, value = (part.to(torch.bfloat16) for part in (query, key, value))
    hidden = None if mask is None else _hiding(mask)
    out: Tensor = _Products.apply(query * query.shape[-1] ** -0.5, key, value, hidden)
    return out


def _hiding(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.bfloat16).masked_fill_(~mask, float("-inf"))


class _Products(torch.autograd.Function):
    """softmax(query @ key.T + hiding) @ value. It stores the probabilities, but not the scores."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, hiding: Tensor | None
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            scores = query @ key.mT
            if hiding is not None:
                scores += hiding
            shares = scores.softmax(-1)
            ctx.save_for_backward(query, key, value, shares)
            return shares @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        query, key, value, shares = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            by_share = torch._softmax_backward_data(grad @ value.mT, shares, -1, shares.dtype)
            return by_share @ key, by_share.mT @ query, shares.mT @ grad, None
