"""Scores, plans and compacts a layer after the prompt's attention has run in it.

There is one function for each kind of policy. With a policy that decides layer by layer, the layer
is compacted at once. With a policy whose layers share a budget, the layers wait for the last one.
A sequence method that reads attention only plans here; the tokens are removed in `sequence`. A
cache method after it sees the columns that are left. With recall, dropped tokens are parked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plphp.attention import window_probabilities
from plphp.cache import KVStore
from plphp.errors import UnsupportedModelError
from plphp.hf import compat
from plphp.hf.entered import columns_entered, located_here
from plphp.hf.last_queries import last_queries, slot_positions, with_recent
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Prefill
from plphp.hf.recall import park_layer
from plphp.hf.shared import Shared
from plphp.policy import (
    CachePolicy,
    HiddenPolicy,
    KeepPlan,
    LayerView,
    Look,
    Policy,
    sequence_stage,
)

# Keyword arguments of attention functions whose effect on the probabilities is not computed here.
REFUSED = {"s_aux": "attention sinks", "position_bias": "position biases"}


@dataclass(frozen=True)
class Scored:
    """A layer that has read the whole prompt, with the scores of its tokens.

    store: keys and values of the prompt, without drafts
    view: the input of the policy
    drafts: keys and values (B, Hkv, T, D) of the tokens that assisted decoding guessed after the
        prompt; they are kept
    """

    layer: PrunedLayer
    store: KVStore
    view: LayerView
    drafts: tuple[Tensor, Tensor]

    def compact(self, plan: KeepPlan, prefill: Prefill) -> None:
        """Compact the layer to the columns of a plan, and record the plan for the report."""
        positions = slot_positions(prefill, self.store.end)
        prefill.note(self.view.layer, plan, self.view.spans, positions)
        self.layer.compact(plan, self.view.spans, self.drafts)


@dataclass(frozen=True)
class Waiting:
    """A scored layer that waits for the plan of all layers. It holds no attention probabilities.

    positions: (B, slots) int64, row-logical position of each slot
    drafts: as in `Scored`
    """

    layer: PrunedLayer
    look: Look
    positions: Tensor
    drafts: tuple[Tensor, Tensor]


def after_attention(
    module: nn.Module, query: Tensor, layer: PrunedLayer, prefill: Prefill, kwargs: dict[str, Any]
) -> None:
    """Score the last prompt tokens, and plan or compact, if the layer holds the whole prompt now.

    query: (B, H, T, D) of this forward
    kwargs: the keyword arguments of the attention function
    Raises UnsupportedModelError for attention whose probabilities cannot be computed here.
    """
    store, shared = layer.store, layer.shared
    if not isinstance(store, KVStore):
        return
    index, end = int(module.layer_idx), prefill.prompt.end  # type: ignore[arg-type]
    part = prefill.part
    if part is not None:
        store.close_gaps(part.plan)
        layer.raw = False
    recalls = shared.recall is not None and prefill.located is not None
    prefill.here = located_here(layer, prefill) if recalls and prefill.prompt.begin else None
    window = shared.policy.window
    fillers = part.plan.start if part is not None and part.plan.ragged else None
    query = with_recent(layer.recent, query, fillers)
    waits = store.logical < end  # for a chunk after this one
    layer.recent = query[:, :, -window:].clone() if waits and window > 1 else None
    prefill.check(index, query[:, :, -1])
    if waits or not prefill.where.prunes:
        return
    measure_keys(store, prefill, shared, index)
    first, second = shared.stages(index)
    first = None if prefill.ahead else first  # it has chosen
    second = None if prefill.plans_now else second  # this layer is a copy
    if first is None and second is None:
        if prefill.remaining is not None:
            record_remaining(layer, store, prefill, index)
        return
    begin = store.logical - query.shape[2]  # column of the first of these queries
    drafts = store.split(store.logical - end)
    view = _view(module, query, store, prefill, begin, window, kwargs)
    over_ranks = shared.over_ranks or view.over_ranks
    view = replace(view, layer=index, layers=shared.depth, over_ranks=over_ranks)
    plan = None if first is None else first.plan(_of_prompt(view, prefill.prompt.length))
    if second is not None:
        act = park if shared.recall is not None else BY_KIND[second.kind]
        act(second, Scored(layer, store, view, drafts), prefill)
        layer.entered = columns_entered(layer, prefill) if recalls else None
    else:
        store.append(*drafts)
    if plan is not None:
        prefill.leave(plan, "flash" in shared.config._attn_implementation)


def plan_now(policy: Policy, scored: Scored, prefill: Prefill) -> None:
    """For a policy that decides layer by layer: plan and compact at once."""
    scored.compact(policy.plan(scored.view), prefill)


def park(policy: Policy, scored: Scored, prefill: Prefill) -> None:
    """For any policy with recall: park the vision tokens and compact the layer at once."""
    scored.compact(park_layer(scored.layer, scored.view, prefill.entered.places), prefill)


def plan_together(policy: Policy, scored: Scored, prefill: Prefill) -> None:
    """For a policy whose layers share a budget: plan and compact all layers in the last one."""
    layer = scored.layer
    assert isinstance(policy, CachePolicy)
    positions = slot_positions(prefill, scored.store.end)
    waiting = Waiting(layer, policy.look(scored.view), positions, scored.drafts)
    prefill.waiting[scored.view.layer] = waiting
    if not all(index in prefill.waiting for index in layer.shared.prunable):
        return
    indices = sorted(prefill.waiting)
    plans = policy.plan_all([prefill.waiting[index].look for index in indices])
    for index, plan in zip(indices, plans, strict=True):
        ready = prefill.waiting.pop(index)
        prefill.note(index, plan, ready.look.spans, ready.positions)
        ready.layer.compact(plan, ready.look.spans, ready.drafts)


BY_KIND: dict[str, Callable[[Policy, Scored, Prefill], None]] = {
    "layer": plan_now,
    "layers": plan_together,
}


def measure_keys(store: KVStore, prefill: Prefill, shared: Shared, index: int) -> None:
    """Measure the keys of a layer, if a sequence method reads their sizes before the next one."""
    method, prompt = sequence_stage(shared.policy), prefill.prompt
    if not isinstance(method, HiddenPolicy) or not method.reads_keys:
        return
    if index == method.leave_at(shared.depth) - 1:
        end = store.end - (store.logical - prompt.end)  # guessed tokens come after the prompt
        keys = store.held()[0][:, :, end - prompt.length : end]
        sizes = keys.abs().sum((1, 3), dtype=torch.float32)
        prefill.key_sizes = sizes if shared.over_ranks is None else shared.over_ranks(sizes)


def record_remaining(layer: PrunedLayer, store: KVStore, prefill: Prefill, index: int) -> None:
    """Record for the report what a layer holds that only a sequence method has pruned."""
    assert prefill.remaining is not None
    plan, where = prefill.remaining.plan, prefill.where
    every_head = replace(plan, columns=plan.columns.expand(-1, store.keys.shape[1], -1))
    prefill.plans[index] = (every_head, where.spans, where.positions())


def _of_prompt(view: LayerView, columns: int) -> LayerView:
    """What a sequence method is shown: the prompt's columns, as a layer with one KV head."""
    probs, spans = view.probs[..., -columns:], view.spans[:, -columns:]
    return replace(
        view, kv_heads=1, probs=probs, spans=spans, window=None, asked=None, keys=None, values=None
    )


def _view(
    module: nn.Module,
    query: Tensor,
    store: KVStore,
    prefill: Prefill,
    first: int,
    window: int,
    kwargs: dict[str, Any],
) -> LayerView:
    """The input of a policy for one layer, without the fields that `after_attention` adds.

    query: (B, H, T, D), of the columns from `first` on
    window: how many last tokens of each row are scored
    Raises UnsupportedModelError for attention whose probabilities cannot be computed here.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} uses {what}, so its tokens cannot be scored"
            )
    keys, values = store.held()
    last = last_queries(prefill, store, query.shape[2], first, window)
    rows = torch.arange(len(query), device=query.device)[:, None]
    probs = window_probabilities(
        query[rows, :, last.place].transpose(1, 2),
        keys,
        last.visible,
        compat.scale(query, kwargs),
        compat.softcap(module.config, kwargs),
    )
    prefill.check(int(module.layer_idx), probs[:, :, -1].sum(-1))  # type: ignore[arg-type]
    return LayerView(
        probs=probs[:, :, -1],
        spans=last.spans,
        kv_heads=keys.shape[1],
        window=probs,
        asked=last.slots,
        keys=keys,
        values=values,
        images=max(prefill.where.images, 0),
    )
