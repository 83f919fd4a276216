"""The index: a small approximation of keys, by which a query chooses tokens.

    B        = r4(the first `rank` principal directions of the keys)
    c[j]     = r4((k[j] - mean k) B (B^T B)^-1)      so that k[j] - mean k is about B c[j]
    a[h, j]  = (q_h B) . c[j]                        the logit of query head h, up to a constant
    score[j] = max over h of  (a[h, j] - max_i a[h, i])

r4 rounds to 4 bits over the range of a direction (`codes.to_rows`). Keys of images lie near a
subspace of few dimensions (Loki, arXiv 2406.02542). Subtracting the mean changes all logits of a
query by the same number. c is fitted to the rounded directions, so that their rounding has no other
effect than to turn the subspace a little. The score is relative to the highest logit of each query
head, so that every query head gets the tokens to which it attends most. This chose better than sums
of probabilities and than the sum of the queries, and it needs no exponentials
(dev/studies/recall_index.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from plphp._blocks import at_once
from plphp.recall.codes import from_rows, row_bytes, to_rows

# Subtracted from the score for each earlier token, so that of equal scores the first always wins.
TIE_STEP = 2.0**-20
BITS = 4  # 8 bits choose no better, and take twice the bytes from the budget (docs/recall-how.md)


@dataclass
class KeyIndex:
    """The index of V keys in every KV head.

    codes: (B, Hkv, rank, bytes of V numbers) uint8, c in rows as `codes.to_rows` writes them
    basis: (B, Hkv, rank, bytes of D numbers) uint8, the transpose of B in such rows
    tokens: V
    """

    codes: Tensor
    basis: Tensor
    tokens: int

    def scores(self, query: Tensor) -> Tensor:
        """Scores (B, Hkv, V) float32 of the tokens for queries (B, H, 1, D)."""
        dim = query.shape[-1]
        grouped = query.reshape(*self.codes.shape[:2], -1, dim).float()
        logits = grouped @ from_rows(self.basis, BITS)[..., :dim].mT @ from_rows(self.codes, BITS)
        logits = logits[..., : self.tokens]
        scores = (logits - logits.amax(-1, keepdim=True)).amax(2)
        return torch.sub(scores, torch.arange(self.tokens, device=scores.device), alpha=TIE_STEP)

    def tensors(self) -> list[Tensor]:
        """The tensors of the index."""
        return [self.codes, self.basis]

    def through(self, change: Callable[[Tensor], Tensor]) -> KeyIndex:
        """The same index with each tensor replaced by `change` of it, such as on another device."""
        return KeyIndex(change(self.codes), change(self.basis), self.tokens)


def build(keys: Tensor, valid: Tensor, rank: int) -> KeyIndex:
    """Make the index of keys (B, Hkv, V, D).

    valid: (B, V) bool, False for fillers, which do not count
    rank: number of directions, at most D
    """
    mask = valid[:, None, :, None]
    length = at_once(keys, keys.shape[:2].numel() * keys.shape[3])
    blocks = list(zip(torch.split(keys, length, 2), torch.split(mask, length, 2), strict=True))
    total = reduce(torch.add, ((k.float() * m).sum(2, keepdim=True) for k, m in blocks))
    mean = total / valid.sum(-1).clamp(min=1)[:, None, None, None]

    def centred() -> Iterator[Tensor]:
        return ((k.float() * m - mean) * m for k, m in blocks)

    products = reduce(torch.add, (x.mT @ x for x in centred()))
    directions = torch.linalg.eigh(products).eigenvectors[..., -rank:]
    basis = to_rows(directions.mT, BITS)
    rounded = from_rows(basis, BITS)[..., : keys.shape[-1]]  # (B, Hkv, rank, D)
    inverse = torch.linalg.pinv(rounded @ rounded.mT, hermitian=True)
    fitted = torch.cat([x @ rounded.mT @ inverse for x in centred()], 2).mT
    length = at_once(keys, fitted[:, :, :1].numel())
    rows = [to_rows(part, BITS) for part in torch.split(fitted, length, 2)]
    return KeyIndex(torch.cat(rows, 2), basis, keys.shape[2])


def index_bytes(tokens: Tensor, dim: int, rank: int) -> Tensor:
    """Bytes (B,) of the index of one KV head. tokens: (B,); dim: D."""
    return rank * (row_bytes(tokens, BITS) + row_bytes(dim, BITS))
