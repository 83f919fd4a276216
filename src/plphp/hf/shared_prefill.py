"""Reads a prompt once and makes the caches of many policies from it, to compare methods.

The prefill itself does not depend on what is kept afterwards. So it runs once, with a policy that
keeps everything and records the input that a policy gets in each layer. Any number of pruned caches
are then made from the record, with the same policies and the same compaction as in runs of their
own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from plphp.cache import KVStore
from plphp.errors import UnsupportedModeError
from plphp.hf.attach import prune
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.last_queries import slot_positions
from plphp.hf.layer import PrunedLayer
from plphp.hf.located import Located
from plphp.hf.prompt import Prefill
from plphp.hf.recall import park_layer
from plphp.hf.report import build_report
from plphp.policy import KeepPlan, LayerView, Policy, plan_views, policy
from plphp.report import Seen


@dataclass
class Recorder(Policy):
    """A policy that keeps everything and records the view of every layer.

    window: how many last prompt tokens are scored
    views: layer -> its view
    """

    window: int = 64
    views: dict[int, LayerView] = field(default_factory=dict)

    def plan(self, view: LayerView) -> KeepPlan:
        self.views[view.layer] = view
        return policy("full").plan(view)


@dataclass(frozen=True)
class SharedPrefill:
    """A batch of prompts that has been read once, with its unpruned cache.

    first: (B, 1) int64, the greedy first token of the answer, the same for all policies
    logits: (B, vocabulary), from which `first` was chosen
    columns: N, number of columns of the prompt
    cache: the unpruned cache
    views: layer -> the input that a policy gets; empty if a policy read the prompt that prunes
    window: how many last prompt tokens were scored
    seen: where the images are, for the reports of the caches that are made
    """

    first: Tensor
    logits: Tensor
    columns: int
    cache: PrunedCache
    views: dict[int, LayerView] = field(default_factory=dict)
    window: int = 0
    seen: Seen | None = None

    def pruned(self, pruning: Pruning) -> PrunedCache:
        """The cache that a prefill under another pruning would have left, with its report.

        pruning: attached to the same model, with a policy that prunes the cache and whose `window`
            is at most that of this object
        Raises UnsupportedModeError for other policies.
        """
        policy = pruning.policy
        if not policy.prunes_cache or policy.window > self.window:
            raise UnsupportedModeError(
                f"{type(policy).__name__} cannot be planned afterwards: it changes the prefill "
                f"itself, or scores more than the last {self.window} prompt tokens"
            )
        cache = PrunedCache(pruning.model)
        cache.shift = copy.copy(self.cache.shift)
        prefill = self._begun(cache, pruning)
        cache.layers = [self._layer(index, cache) for index in range(len(self.cache.layers))]
        views = {index: _narrow(view, policy.window) for index, view in self.views.items()}
        recalls = cache.shared.recall is not None
        cache.shared.spans = prefill.where.spans if recalls else None
        planned = dict.fromkeys(views) if recalls else plan_views(policy, views)
        for index, plan in planned.items():
            prefill.check(index, views[index].probs.sum(-1))
            plan = adopt_view(cache.layers[index], views[index], plan)
            prefill.note(index, plan, views[index].spans, slot_positions(prefill, self.columns))
        cache._finish(replace(build_report(cache, prefill), seen=self.seen))
        return cache

    def stock(self) -> DynamicCache:
        """transformers' own cache, as this prompt would have left it on a model not attached."""
        cache = DynamicCache(config=self.cache.config)
        for index, layer in enumerate(self.cache.layers):
            if isinstance(layer, PrunedLayer):
                cache.update(*self._held(index, layer), index)
            else:
                cache.layers[index] = copy.deepcopy(layer)
        return cache

    def _held(self, index: int, layer: PrunedLayer) -> tuple[Tensor, Tensor]:
        """Keys and values of every column of a layer: (B, Hkv, N, D) and (B, Hkv, N, Dv)."""
        view = self.views.get(index)
        if view is None:  # nothing of this layer was chosen from, so its store is whole
            assert layer.store is not None
            return layer.store.held()
        assert view.keys is not None and view.values is not None
        return view.keys, view.values

    def _begun(self, cache: PrunedCache, pruning: Pruning) -> Prefill:
        """The state of the prefill, with its images located."""
        prefill = cache._begin(self.columns, {}, pruning)
        spans = [view.spans for view in self.views.values()]
        where = spans[0] if spans else torch.zeros(len(self.first), self.columns).long()
        before = torch.zeros(len(self.first), device=where.device).long()
        images = int(where.max())
        prefill.located = Located(where, self.columns, before, images, bool(spans))
        return prefill

    def _layer(self, index: int, cache: PrunedCache) -> Any:
        """An empty layer for `cache`, or a copy of a layer that is not pruned."""
        layer = self.cache.layers[index]
        if not isinstance(layer, PrunedLayer):
            return copy.deepcopy(layer)
        new = PrunedLayer(layer.window, cache.shared)
        if index not in self.views:  # no layer of a prompt without images and padding has a view
            new.store = copy.deepcopy(layer.store)
        new.is_initialized = True
        return new


def read(model: Any, inputs: Mapping[str, Tensor], window: int = 64) -> SharedPrefill:
    """Read a batch of prompts once, for any number of policies.

    model: one that is not attached
    inputs: keyword arguments of `model.generate`
    window: how many last prompt tokens to score; policies with a larger `window` are refused later
    Raises as `plphp.prune`.
    """
    recorder = Recorder(window)
    with prune(model, recorder):
        prompt = read_into(PrunedCache(model), model, inputs)
    report = prompt.cache.report
    seen = None if report is None else report.seen
    return replace(prompt, views=recorder.views, window=window, seen=seen)


def read_into(cache: PrunedCache, model: Any, inputs: Mapping[str, Tensor]) -> SharedPrefill:
    """Read a batch of prompts into a cache, under the pruning that is attached to the model.

    The result has no views, so that no other cache can be made from it.
    """
    out = model.generate(
        **inputs,
        cache=cache,
        max_new_tokens=1,
        do_sample=False,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return SharedPrefill(out.sequences[:, -1:], out.logits[0], int(cache.get_seq_length()), cache)


def adopt(layer: PrunedLayer, keys: Tensor, values: Tensor, plan: KeepPlan, spans: Tensor) -> None:
    """Store in a layer what a plan keeps of the keys and values (B, Hkv, N, D) of a prompt.

    spans: (B, N) int64 of the prompt
    """
    layer.is_initialized = True
    layer.store = KVStore(keys, values, layer.window)
    layer.compact(plan, spans)


def adopt_view(layer: PrunedLayer, view: LayerView, plan: KeepPlan | None) -> KeepPlan:
    """Store in a layer what a plan keeps of a view, and return the plan.

    plan: None with recall, which parks the vision tokens and makes the plan
    """
    assert view.keys is not None and view.values is not None
    if plan is None:
        layer.store = KVStore(view.keys, view.values, layer.window)
        plan = park_layer(layer, view)
    adopt(layer, view.keys, view.values, plan, view.spans)
    return plan


def _narrow(view: LayerView, window: int) -> LayerView:
    """The same view with the scores of the last `window` prompt tokens only."""
    if view.window is None or view.asked is None:
        return view
    last = min(window, view.window.shape[2])
    return replace(view, window=view.window[:, :, -last:], asked=view.asked[:, -last:])
