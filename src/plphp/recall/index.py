"""A small index of keys: enough to tell which of them a query looks for, in a few bytes a token.

    k'[j]    = (k[j] - mean_j k) B              B: the first `rank` principal directions of the keys
    c[j]     = round(k'[j] / s)                 8 bits; s: one step a component, its largest / 127
    a[h, j]  = ((q_h B) * s) . c[j]             the logit of query head h but for one number a head
    score[j] = max over h of  (a[h, j] - max_i a[h, i])

Keys of images lie near a subspace of few dimensions (Loki, arXiv 2406.02542), and taking the mean
off shifts all logits of a query alike. What each query head of a KV head looks at most comes first:
that chose better than sums of probabilities and than the sum of the queries, and costs no
exponentials (dev/studies/recall_index.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127  # of 8 bits, on either side of zero


@dataclass
class KeyIndex:
    """codes: (B, Hkv, rank, V) int8; basis: (B, Hkv, D, rank) int8; step: (B, Hkv, 1, rank)
    float32, what both leave out.
    """

    codes: Tensor
    basis: Tensor
    step: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """(B, Hkv, V) float32 for queries (B, H, 1, D); the higher the better."""
        asked = query.reshape(*self.codes.shape[:2], -1, query.shape[-1]).float()
        logits = (asked @ self.basis.float() * self.step) @ self.codes.float()
        return (logits - logits.amax(-1, keepdim=True)).amax(2)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.basis, self.step]

    def through(self, change: Callable[[Tensor], Tensor]) -> KeyIndex:
        """The same with every tensor changed: other rows, another device."""
        return KeyIndex(change(self.codes), change(self.basis), change(self.step))


def build(keys: Tensor, valid: Tensor, rank: int) -> KeyIndex:
    """The index of keys (B, Hkv, V, D), of which `valid` (B, V) bool count. rank: at most D."""
    seen = valid[:, None, :, None]
    own = keys.float() * seen
    mean = own.sum(2, keepdim=True) / valid.sum(-1).clamp(min=1)[:, None, None, None]
    own = (own - mean) * seen
    basis = torch.linalg.eigh(own.mT @ own).eigenvectors[..., -rank:]
    coarse = _step(basis)
    found = own @ basis
    step = _step(found)
    codes = (found / step).round().to(torch.int8).mT.contiguous()
    return KeyIndex(codes, (basis / coarse).round().to(torch.int8), coarse * step)


def index_bytes(tokens: Tensor, dim: int, rank: int) -> Tensor:
    """Bytes of a KV head's index over so many tokens (B,)."""
    return rank * (tokens + dim + 4)


def _step(x: Tensor) -> Tensor:
    """(B, Hkv, 1, C): what the largest entry of a column is 127 of."""
    return x.abs().amax(2, keepdim=True).clamp(min=1e-12) / LEVELS
