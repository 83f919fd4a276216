"""A small index of keys: enough to tell which of them a query looks for, in a few bytes a token.

    k'[j]    = (k[j] - mean_j k) B         B: the first `rank` principal directions of the keys
    c[j]     = round(k'[j] / s), in 8 bits s: one step a component, from its largest entry
    score[j] = sum over query heads h of the KV head  ((q_h B) * s) . c[j]

Keys of images lie near a subspace of few dimensions (Loki, arXiv 2406.02542), and taking the mean
off shifts all scores of a query alike. One score serves all query heads of a KV head: their sum did
not choose worse than the largest probability (dev/studies/recall_index.py) and costs a G-th.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 127


@dataclass
class KeyIndex:
    """codes: (B, Hkv, rank, V) int8; basis: (B, Hkv, D, rank), its columns scaled by the steps."""

    codes: Tensor
    basis: Tensor

    def scores(self, query: Tensor) -> Tensor:
        """(B, Hkv, V) float32 for queries (B, H, 1, D); the higher the better."""
        lead = self.codes.shape[:2]
        asked = query.reshape(*lead, -1, query.shape[-1]).float().sum(2, keepdim=True)
        asked = asked @ self.basis.float()
        return (asked @ self.codes.to(asked.dtype))[:, :, 0]

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.basis]

    def take(self, rows: Tensor) -> None:
        """Rows (B',) of the batch."""
        self.codes, self.basis = self.codes[rows], self.basis[rows]

    def move(self, device: torch.device) -> None:
        self.codes, self.basis = self.codes.to(device), self.basis.to(device)


def build(keys: Tensor, valid: Tensor, rank: int) -> KeyIndex:
    """The index of keys (B, Hkv, V, D), of which `valid` (B, V) bool count. rank: at most D."""
    own = keys.float()
    seen = valid[:, None, :, None]
    own = own * seen
    mean = own.sum(2, keepdim=True) / valid.sum(-1).clamp(min=1)[:, None, None, None]
    own = (own - mean) * seen
    basis = torch.linalg.eigh(own.transpose(2, 3) @ own).eigenvectors[..., -rank:]
    found = own @ basis
    step = found.abs().amax(2, keepdim=True).clamp(min=1e-12) / LEVELS
    codes = (found / step).round().to(torch.int8).transpose(2, 3).contiguous()
    return KeyIndex(codes, (basis * step).to(keys.dtype).contiguous())
