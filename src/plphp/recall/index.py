"""A small index of keys: enough to tell which of them a query looks for, in a few bytes a token.

    B        = r4(the first `rank` principal directions of the keys)
    c[j]     = r4((k[j] - mean k) B (B^T B)^-1)      so that k[j] - mean k is about B c[j]
    a[h, j]  = (q_h B) . c[j]                        the logit of query head h but for one number
    score[j] = max over h of  (a[h, j] - max_i a[h, i])

r4: rounded to 4 bits over the range of a direction, `codes.to_rows`. Keys of images lie near a
subspace of few dimensions (Loki, arXiv 2406.02542), and taking the mean off shifts all logits of a
query alike. c is fitted to the rounded directions: they span a subspace a little off, and that is
all that rounding them does. What each query head of a KV head looks at most comes first: that chose
better than sums of probabilities and than the sum of the queries, and costs no exponentials
(dev/studies/recall_index.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.recall.codes import from_rows, row_bytes, to_rows

EARLIER = 2.0**-20  # what a token loses to the one before it: equals go alike in every batch
BITS = 4  # 8 choose no better, and take twice the bytes from the tokens (docs/recall.md)


@dataclass
class KeyIndex:
    """codes: (B, Hkv, rank, row of V), basis: (B, Hkv, rank, row of D), uint8 as `to_rows` has it.

    tokens: V
    """

    codes: Tensor
    basis: Tensor
    tokens: int

    def scores(self, query: Tensor) -> Tensor:
        """(B, Hkv, V) float32 for queries (B, H, 1, D); the higher the better."""
        dim = query.shape[-1]
        asked = query.reshape(*self.codes.shape[:2], -1, dim).float()
        logits = asked @ from_rows(self.basis, BITS)[..., :dim].mT @ from_rows(self.codes, BITS)
        logits = logits[..., : self.tokens]
        scores = (logits - logits.amax(-1, keepdim=True)).amax(2)
        return torch.sub(scores, torch.arange(self.tokens, device=scores.device), alpha=EARLIER)

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.basis]

    def through(self, change: Callable[[Tensor], Tensor]) -> KeyIndex:
        """The same with every tensor changed: other rows, another device."""
        return KeyIndex(change(self.codes), change(self.basis), self.tokens)


def build(keys: Tensor, valid: Tensor, rank: int) -> KeyIndex:
    """The index of keys (B, Hkv, V, D), of which `valid` (B, V) bool count. rank: at most D."""
    seen = valid[:, None, :, None]
    own = keys.float() * seen
    mean = own.sum(2, keepdim=True) / valid.sum(-1).clamp(min=1)[:, None, None, None]
    own = (own - mean) * seen
    directions = torch.linalg.eigh(own.mT @ own).eigenvectors[..., -rank:]
    basis = to_rows(directions.mT, BITS)
    rough = from_rows(basis, BITS)[..., : keys.shape[-1]]  # (B, Hkv, rank, D)
    found = own @ rough.mT @ torch.linalg.pinv(rough @ rough.mT, hermitian=True)
    return KeyIndex(to_rows(found.mT, BITS), basis, keys.shape[2])


def index_bytes(tokens: Tensor, dim: int, rank: int) -> Tensor:
    """Bytes of a KV head's index over so many tokens (B,)."""
    return rank * (row_bytes(tokens, BITS) + row_bytes(dim, BITS))
