"""What happens to a layer once the prompt's attention has run: scored, planned, compacted.

A policy that decides layer by layer compacts at once; one whose layers share a budget waits for the
last layer; one that works on the hidden states plans here and acts in `sequence`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plphp.attention import window_probabilities
from plphp.cache import KVStore
from plphp.errors import UnsupportedModelError
from plphp.hf import compat
from plphp.hf.layer import PrunedLayer
from plphp.hf.leaving import Leaving
from plphp.hf.recall import park_layer
from plphp.hf.turn import Turn, asked, slot_positions
from plphp.policy import CachePolicy, LayerView, Look, SequencePolicy

REFUSED = {"s_aux": "attention sinks", "position_bias": "position biases"}


@dataclass(frozen=True)
class Waiting:
    """A layer that has been looked at and waits for the others."""

    layer: PrunedLayer
    look: Look
    positions: Tensor
    drafts: tuple[Tensor, Tensor]


def after_attention(
    module: nn.Module, query: Tensor, layer: PrunedLayer, turn: Turn, kwargs: dict[str, Any]
) -> None:
    """Score the prompt's last tokens and act on it, once the layer holds the whole prompt.

    query (B, H, T, D) of this forward.
    """
    store, policy = layer.store, layer.shared.policy
    if not isinstance(store, KVStore):
        return
    if turn.leaving is not None:
        return _left(layer, turn, int(module.layer_idx))  # type: ignore[arg-type]
    query = layer.with_recent(query)
    if store.logical < turn.end:  # a chunk of the prompt; its images are known with the last one
        layer.recent = query[:, :, -policy.window :].clone() if policy.window > 1 else None
        return
    layer.recent = None
    if not turn.prunes:
        return
    index = int(module.layer_idx)  # type: ignore[arg-type]
    if isinstance(policy, SequencePolicy) and index != policy.leave_at(layer.shared.depth) - 1:
        return
    first = store.logical - query.shape[2]  # column of the first of these queries
    drafts = store.split(store.logical - turn.end)  # assisted decoding guesses past the prompt
    view = _view(module, query, store, turn, first, policy.window, kwargs)
    view = replace(view, layer=index, layers=layer.shared.depth)
    if layer.shared.over_ranks is not None:
        view = replace(view, over_ranks=layer.shared.over_ranks)
    if isinstance(policy, SequencePolicy):
        plan = policy.plan(replace(view, kv_heads=1))
        turn.leaving = Leaving(
            plan, turn.length, "flash" in layer.shared.config._attn_implementation
        )
    elif (
        layer.shared.recall is None and isinstance(policy, CachePolicy) and policy.kind == "layers"
    ):
        turn.waiting[index] = Waiting(
            layer, policy.look(view), slot_positions(turn, store.end), drafts
        )
        if all(i in turn.waiting for i in layer.shared.prunable):
            _plan_together(policy, turn)
    else:
        plan = policy.plan(view) if layer.shared.recall is None else park_layer(layer, view)
        turn.plans[index] = (plan, view.spans, slot_positions(turn, store.end))
        layer.compact(plan, drafts)


def _plan_together(policy: Any, turn: Turn) -> None:
    """All layers are there: share the budget among them and compact every one."""
    indices = sorted(turn.waiting)
    plans = policy.plan_all([turn.waiting[index].look for index in indices])
    for index, plan in zip(indices, plans, strict=True):
        waiting = turn.waiting.pop(index)
        turn.plans[index] = (plan, waiting.look.spans, waiting.positions)
        waiting.layer.compact(plan, waiting.drafts)


def _left(layer: PrunedLayer, turn: Turn, index: int) -> None:
    """A layer that tokens had left before: what it holds is what the plan kept."""
    assert isinstance(layer.store, KVStore) and turn.leaving is not None and turn.spans is not None
    plan, spans = turn.leaving.plan, turn.spans
    layer.store.name_columns(plan, turn.end)
    layer.raw = False
    every_head = plan.columns.expand(-1, layer.store.keys.shape[1], -1)
    turn.plans[index] = (replace(plan, columns=every_head), spans, turn.positions())


def _view(
    module: nn.Module,
    query: Tensor,
    store: KVStore,
    turn: Turn,
    first: int,
    window: int,
    kwargs: dict[str, Any],
) -> LayerView:
    """What a policy sees of a layer. Queries (B, H, T, D) are those of the columns from `first` on,
    of which the last `window` tokens of each row are asked.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} uses {what}; it cannot be scored")
    keys, values = store.held()
    last = asked(turn, store, query.shape[2], first, window)
    rows = torch.arange(len(query), device=query.device)[:, None]
    seen = window_probabilities(
        query[rows, :, last.place].transpose(1, 2),
        keys,
        last.visible,
        compat.scale(query, kwargs),
        compat.softcap(module.config, kwargs),
    )
    return LayerView(
        probs=seen[:, :, -1],
        spans=last.spans,
        kv_heads=keys.shape[1],
        window=seen,
        asked=last.slots,
        keys=keys,
        values=values,
        images=max(turn.images, 0),
    )
