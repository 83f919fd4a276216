"""Scoring, selection and compaction of a prompt whose last token has been computed.

A policy sees the layers of one request as the rows of one batch, so that vision attention, layer
classes and plans of all layers are computed at once. Shapes: L layers, H query heads, Hkv KV heads,
N prompt tokens, D head dimension.
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
    """One decoder layer in a worker.

    name: vLLM's name of the layer
    group: index of its cache group
    module: vLLM's Attention, which owns the paged cache
    read: function that reads the cache of the layer's attention backend
    """

    name: str
    group: int
    module: Any
    read: Reader

    @property
    def kv_heads(self) -> int:
        """The number of KV heads of this tensor-parallel rank."""
        return int(self.module.num_kv_heads)

    @property
    def scale(self) -> float:
        """The factor that attention logits are multiplied with."""
        return float(self.module.impl.scale)

    @property
    def softcap(self) -> float | None:
        """The soft cap of attention logits, or None."""
        return self.module.impl.logits_soft_cap or None

    def score(self, query: Tensor, blocks: Tensor, length: int) -> Tensor:
        """The attention of the last prompt token, (H, N) float32.

        query: (H, D) of the last prompt token; blocks: (n,) of the prompt; length: N
        """
        keys, _ = self.read(self.module.kv_cache, blocks)
        valid = torch.ones(1, length, dtype=torch.bool, device=keys.device)
        keys = keys[None, :, :length]
        return last_token_probabilities(query[None], keys, valid, self.scale, self.softcap)[0]

    def gather(self, blocks: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (Hkv, K, D) at columns (Hkv, K) of a block table (n,)."""
        keys, values = self.read(self.module.kv_cache, blocks)
        index = columns[..., None].expand(-1, -1, keys.shape[-1])
        return keys.gather(1, index), values.gather(1, index)

    def move(self, columns: Tensor, source: Tensor, target: Tensor, first: int, block: int) -> None:
        """Copy the kept tokens to the positions [first, first + K) of a block table.

        columns: (Hkv, K), ascending
        source, target: (n,), the block table to read and the one to write
        block: tokens per block
        """
        kept = [part.transpose(0, 1).contiguous() for part in self.gather(source, columns)]
        index = torch.arange(first, first + columns.shape[1], device=columns.device)
        slots = target[index // block].long() * block + index % block
        self.module.impl.do_kv_cache_update(self.module, *kept, self.module.kv_cache, slots)


def choose(
    probs: Tensor,
    spans: Tensor,
    policy: PLPHP,
    kv_heads: int,
    layers_per_group: int,
    over_ranks: Callable[[Tensor], Tensor],
) -> KeepPlan:
    """The plan of all layers; its rows are the layers.

    probs: (L, H, N) float32, spans: (N,) int64
    layers_per_group: number of consecutive layers that share a block table. Each of them selects
        its own tokens, but keeps as many as the layer of the group that keeps the most
    over_ranks: as in `LayerView`
    """
    view = LayerView(probs, spans.expand(len(probs), -1), kv_heads, over_ranks=over_ranks)
    look = policy.look(view)
    quota, total = policy.counts(look.rate, look.spans)
    assert total is not None, "round_to is the block size, so there is a total per row"
    most = total.view(-1, layers_per_group).amax(1).repeat_interleave(layers_per_group)
    return pack(
        steps.select(look.scores, look.spans, quota, most), look.gamma, look.rate, look.classes
    )


def choose_again(
    probs: Tensor, spans: Tensor, policy: PLPHP, kv_heads: int, rate: float, kept: int
) -> Tensor:
    """The columns (Hkv, K) that one layer keeps of a request that was preempted.

    probs: (H, N) float32, spans: (N,) int64
    rate, kept: the layer's retention rate and number of vision tokens before the preemption. With
        these given, no other layer and no other tensor-parallel rank is needed
    """
    view = LayerView(probs[None], spans[None], kv_heads)
    rates = torch.tensor([rate], dtype=torch.float64, device=probs.device)
    quota, _ = policy.counts(rates, view.spans)
    keep = steps.select(policy.scores(view), view.spans, quota, quota.new_tensor([kept]))
    return pack(keep, rates.float(), rates, quota.new_tensor([0])).columns[0]


def summary(plan: KeepPlan, spans: Tensor, block: int, layers_per_group: int) -> Choice:
    """The numbers of a plan that the scheduler needs. The host reads from the device once.

    spans: (N,) int64; block: tokens per block; layers_per_group: as in `choose`
    """
    numbers = torch.stack([plan.lengths.double(), plan.rate, plan.classes.double()]).tolist()
    lengths = [int(n) for n in numbers[0]]
    text = int((spans == 0).sum())
    return Choice(
        freed=tuple((len(spans) - n) // block for n in lengths[::layers_per_group]),
        kept=tuple(n - text for n in lengths),
        rates=tuple(numbers[1]),
        classes=tuple(int(n) for n in numbers[2]),
    )
