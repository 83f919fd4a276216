"""Random pruning: a control. A useful policy loses less than this one at the same budget.

    keep = of each image i  min(|V_i|, ceil(budget |V_i| - 1e-6))  random tokens, different ones in
           each layer and each KV head

The random numbers are a hash of (seed, layer, head, position). A row therefore keeps the same
tokens alone and in a batch, on every device and in every run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy.base import CachePolicy, Look, flat_look
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Random(CachePolicy):
    """Random tokens of each image.

    budget: the share of vision tokens kept, 0 to 1
    seed: of the random numbers, at least 0
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_count("seed", self.seed, 0, most=2**63 - 1)

    def look(self, view: LayerView) -> Look:
        position = ((view.spans >= 0).cumsum(-1) - 1)[:, None]
        heads = torch.arange(view.kv_heads, device=position.device)[:, None]
        drawn = scramble(scramble(scramble(self.seed + scramble(position)) + view.layer) + heads)
        # float32 represents integers of up to 24 bits exactly.
        return flat_look(view, (drawn & 0xFFFFFF).float(), self.budget)


def scramble(x: Tensor) -> Tensor:
    """A non-negative int64 hash of an int64 tensor, element by element.

    Three rounds of multiply and xor-shift mix all 31 bits; products stay within 62 bits, so int64
    does not overflow.
    """
    x = x & 0x7FFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39, 0x1B56C4E9):
        x = x ^ (x >> 15)
        x = (x * factor) & 0x7FFFFFFF
    return x ^ (x >> 16)
