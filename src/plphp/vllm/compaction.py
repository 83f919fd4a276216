"""Scoring, choosing and moving: what happens to a prompt whose last token has been computed.

The layers of one request are the rows of one batch: vision attention, classes and what to keep are
found for all of them at once. Shapes: L layers, H query heads, Hkv KV heads, N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.attention import last_token_probabilities
from plphp.policy import PLPHP, KeepPlan, LayerView, steps
from plphp.policy.view import pack
from plphp.vllm.layout import Reader
from plphp.vllm.messages import Choice


@dataclass(frozen=True)
class Layer:
    """One decoder layer as a worker sees it.

    group: index of its cache group
    module: vLLM's Attention, which owns the paged cache
    read: how the backend's cache is read
    """

    name: str
    group: int
    module: Any
    read: Reader

    @property
    def kv_heads(self) -> int:
        """KV heads of this rank."""
        return int(self.module.num_kv_heads)

    @property
    def scale(self) -> float:
        """What logits are multiplied with."""
        return float(self.module.impl.scale)

    @property
    def softcap(self) -> float | None:
        """The soft cap of the logits, if the model has one."""
        return self.module.impl.logits_soft_cap or None

    def score(self, query: Tensor, blocks: Tensor, length: int) -> Tensor:
        """(H, N) float32 attention of the last prompt token. query (H, D), blocks (n,)."""
        keys, _ = self.read(self.module.kv_cache, blocks)
        valid = torch.ones(1, length, dtype=torch.bool, device=keys.device)
        keys = keys[None, :, :length]
        return last_token_probabilities(query[None], keys, valid, self.scale, self.softcap)[0]

    def gather(self, blocks: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (Hkv, K, D) of columns (Hkv, K) of a table of blocks (n,)."""
        keys, values = self.read(self.module.kv_cache, blocks)
        index = columns[..., None].expand(-1, -1, keys.shape[-1])
        return keys.gather(1, index), values.gather(1, index)

    def move(self, columns: Tensor, source: Tensor, target: Tensor, first: int, block: int) -> None:
        """Write the kept tokens into slots [first, first + K) of a table.

        columns (Hkv, K) ascending; source, target (n,) blocks, each of `block` tokens
        """
        kept = [part.transpose(0, 1).contiguous() for part in self.gather(source, columns)]
        place = torch.arange(first, first + columns.shape[1], device=columns.device)
        slots = target[place // block].long() * block + place % block
        self.module.impl.do_kv_cache_update(self.module, *kept, self.module.kv_cache, slots)


def choose(
    probs: Tensor,
    spans: Tensor,
    policy: PLPHP,
    kv_heads: int,
    together: int,
    over_ranks: Callable[[Tensor], Tensor],
) -> KeepPlan:
    """What every layer keeps. probs (L, H, N), spans (N,).

    together: consecutive layers that share block tables, and so keep as many tokens as the one of
        them that keeps most, each its own best
    """
    view = LayerView(probs, spans.expand(len(probs), -1), kv_heads, over_ranks=over_ranks)
    look = policy.look(view)
    quota, total = policy.counts(look.rate, look.spans)
    assert total is not None, "round_to is a block, so counts are rounded"
    most = total.view(-1, together).amax(1).repeat_interleave(together)
    return pack(
        steps.select(look.scores, look.spans, quota, most), look.gamma, look.rate, look.classes
    )


def choose_again(
    probs: Tensor, spans: Tensor, policy: PLPHP, kv_heads: int, rate: float, kept: int
) -> Tensor:
    """Columns (Hkv, K) of one layer of a request that was preempted. probs (H, N).

    It keeps as many as the first time. So it needs no other layer, and no rank asks another.
    """
    view = LayerView(probs[None], spans[None], kv_heads)
    rates = torch.tensor([rate], dtype=torch.float64, device=probs.device)
    quota, _ = policy.counts(rates, view.spans)
    keep = steps.select(policy.scores(view), view.spans, quota, quota.new_tensor([kept]))
    return pack(keep, rates.float(), rates, quota.new_tensor([0])).columns[0]


def summary(plan: KeepPlan, spans: Tensor, block: int, together: int) -> Choice:
    """The plan in numbers for the scheduler: one host read for all layers."""
    numbers = torch.stack([plan.lengths.double(), plan.rate, plan.classes.double()]).tolist()
    lengths = [int(n) for n in numbers[0]]
    text = int((spans == 0).sum())
    return Choice(
        dead=tuple((len(spans) - n) // block for n in lengths[::together]),
        kept=tuple(n - text for n in lengths),
        rates=tuple(numbers[1]),
        classes=tuple(int(n) for n in numbers[2]),
    )
