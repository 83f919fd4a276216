"""The plans of all layers of one request, computed at once.

A policy sees the layers of one request as the rows of one batch, so that vision attention, layer
classes and plans of all layers are computed at once. Shapes: L layers, H query heads, Hkv KV heads,
N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plphp.paged.prompts import Choice
from plphp.policy import CachePolicy, KeepPlan, LayerView
from plphp.policy.base import keep_best


def choose(
    probs: Tensor,
    spans: Tensor,
    policy: CachePolicy,
    kv_heads: int,
    layers_per_group: int,
    over_ranks: Callable[[Tensor], Tensor],
) -> KeepPlan:
    """The plan of all layers; its rows are the layers.

    probs: (L, H, N) float32, spans: (N,) int64
    policy: its `round_to` is the block size
    layers_per_group: number of consecutive layers that share a block table. Each of them selects
        its own tokens, but keeps as many as the layer of the group that keeps the most
    over_ranks: as in `LayerView`
    """
    view = LayerView(probs, spans.expand(len(probs), -1), kv_heads, over_ranks=over_ranks)
    look = policy.look(view)
    quota, total = policy.counts(look.rate, look.spans)
    assert total is not None, "round_to is the block size, so there is a total per row"
    most = total.view(-1, layers_per_group).amax(1).repeat_interleave(layers_per_group)
    return keep_best(look, look.rate, quota, most)


def choose_again(
    probs: Tensor, spans: Tensor, policy: CachePolicy, kv_heads: int, rate: float, kept: int
) -> Tensor:
    """The columns (Hkv, K) that one layer keeps of a request that was preempted.

    probs: (H, N) float32, spans: (N,) int64
    rate, kept: the layer's retention rate and number of vision tokens before the preemption. With
        these given, no other layer and no other tensor-parallel rank is needed
    """
    look = policy.look(LayerView(probs[None], spans[None], kv_heads))
    rates = torch.tensor([rate], dtype=torch.float64, device=probs.device)
    quota, _ = policy.counts(rates, look.spans)
    return keep_best(look, rates, quota, quota.new_tensor([kept])).columns[0]


def summary(plan: KeepPlan, spans: Tensor, block: int, layers_per_group: int) -> Choice:
    """The numbers of a plan that a scheduler needs. The host reads from the device once.

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
