"""Attention over a layer whose tokens are partly in codes of 4 or 2 bits, in tensor operations.

Logits and sums are float32: codes are decoded to float32, and on a CPU products of a few rows are
faster in float32 than in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch
from torch import Tensor

BLOCK = 2**19  # how many numbers of k or v are converted to float32 at a time


class Keys(Protocol):
    """P keys in codes; see `plphp.recall.codes.KeyCodes`."""

    packed: Tensor
    bits: int
    tokens: int
    group: ClassVar[int]

    def products(self, query: Tensor) -> Iterator[Tensor]: ...


class Values(Protocol):
    """P values in codes; see `plphp.recall.codes.ValueCodes`."""

    packed: Tensor

    def read(self, weights: Tensor) -> Tensor: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codes: tuple[Keys, Values],
    visible: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attention output (B, H, T, Dv) in q's dtype.

    q: (B, H, T, D)
    k, v: (B, Hkv, S, D) and (B, Hkv, S, Dv), the keys and values that are stored in full
    codes: the codes of P further keys and values
    visible: as in `reference.attend`, over the S tokens and then the P
    """
    batch, heads, queries, dim = q.shape
    queries_of_head = scale * q.reshape(batch, k.shape[1], -1, dim).float()
    logits = torch.cat(
        [*(queries_of_head @ part.mT for part in _blocks(k)), *codes[0].products(queries_of_head)],
        -1,
    )
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if visible is not None:
        visible = visible.repeat(1, 1, heads // k.shape[1], 1)
        logits = logits.masked_fill(~visible, -torch.inf)
    weights = logits.softmax(-1)
    out = codes[1].read(weights[..., k.shape[2] :])
    begin = 0
    for part in _blocks(v):
        out += weights[..., begin : (begin := begin + part.shape[2])] @ part
    return out.to(q.dtype).view(batch, heads, queries, -1)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """x (B, Hkv, S, D) in float32, in blocks of tokens with BLOCK numbers or less."""
    length = max(1, BLOCK // (x.shape[0] * x.shape[1] * x.shape[3]))
    return (part.float() for part in torch.split(x, length, 2))
