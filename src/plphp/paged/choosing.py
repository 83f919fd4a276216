"""The plans of all layers of one request, computed at the end of its prompt.

A policy scores one layer after the other. Numbers of tokens and plans are then computed for all
layers at once, with the layers of the request as the rows of a batch. Shapes: L layers, H query
heads, Hkv KV heads, N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor

from plphp.paged.prompts import Choice, PromptEnd
from plphp.policy import CachePolicy, KeepPlan, LayerView, Look
from plphp.policy.base import keep_best


def choose(
    views: Iterable[LayerView], policy: CachePolicy, block: int, layers_per_group: int
) -> KeepPlan:
    """The plan of all layers; its rows are the layers.

    views: one per layer, of one row each. A view is read before the next one is made, so that the
        keys and values of one layer are in memory at a time
    block: tokens per block; the number of dropped tokens is a multiple of it
    layers_per_group: number of consecutive layers that share a block table. Each of them selects
        its own tokens, but keeps as many as the layer of the group that keeps the most
    """
    look = _of_all_layers([policy.look(view) for view in views])
    quota, total = policy.rounded_counts(look.rate, look.spans, block)
    total = quota.sum(-1) if total is None else total
    most = total.view(-1, layers_per_group).amax(1).repeat_interleave(layers_per_group)
    return keep_best(look, look.rate, quota, most)


def choose_again(view: LayerView, policy: CachePolicy, rate: float, kept: int) -> Tensor:
    """The columns (Hkv, K) that one layer keeps of a request that was preempted.

    view: of the layer, with one row
    rate, kept: the layer's retention rate and number of vision tokens before the preemption. With
        these given, no other layer and no other tensor-parallel rank is needed
    """
    look = policy.look(view)
    rates = torch.tensor([rate], dtype=torch.float64, device=view.probs.device)
    quota, _ = policy.counts(rates, look.spans)
    return keep_best(look, rates, quota, quota.new_tensor([kept])).columns[0]


def _of_all_layers(looks: list[Look]) -> Look:
    """One look whose rows are the layers."""
    return Look(*(torch.cat([getattr(look, f.name) for look in looks]) for f in fields(Look)))


def summary(plan: KeepPlan, end: PromptEnd, block: int, layers_per_group: int) -> Choice:
    """The numbers of a plan that a scheduler needs. The host reads from the device once.

    end: the prompt of the plan; block, layers_per_group: as in `choose`
    """
    numbers = torch.stack([plan.lengths.double(), plan.rate, plan.classes.double()]).tolist()
    lengths = [int(n) for n in numbers[0]]
    return Choice(
        freed=tuple((end.length - n) // block for n in lengths[::layers_per_group]),
        kept=tuple(n - end.text for n in lengths),
        rates=tuple(numbers[1]),
        classes=tuple(int(n) for n in numbers[2]),
    )
