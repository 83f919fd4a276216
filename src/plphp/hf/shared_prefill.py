"""One prefill, many policies: for comparing methods, whose prompts are read alike.

A prompt's own forward does not depend on what is kept of it afterwards. So it is run once, with a
policy that keeps everything and remembers what every layer looked like; any number of pruned caches
are then made of it by the same policies and the same compaction as in a run of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.errors import UnsupportedModeError
from plphp.hf.attach import prune
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.last_queries import slot_positions
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Located, Prefill
from plphp.hf.recall import park_layer
from plphp.hf.report import build_report
from plphp.policy import KeepPlan, LayerView, Policy, plan_views, policy
from plphp.report import Seen


@dataclass
class Witness(Policy):
    """Keeps everything, and what each layer looked like. window: the largest of those to come."""

    window: int = 64
    views: dict[int, LayerView] = field(default_factory=dict)

    def plan(self, view: LayerView) -> KeepPlan:
        self.views[view.layer] = view
        return policy("full").plan(view)


@dataclass(frozen=True)
class SharedPrefill:
    """A prompt that has been read once; holds its whole, unpruned cache.

    first: (B, 1) int64, the greedy first token of the answer, which is the same for all policies
    logits: (B, vocabulary) that it was chosen from
    columns: N, of the prompt
    cache, views: everything that its layers hold, and what they looked like to a policy
    window: how many last prompt tokens that policy saw
    seen: where its images stand, for the reports of the caches made of it
    """

    first: Tensor
    logits: Tensor
    columns: int
    cache: PrunedCache
    views: dict[int, LayerView] = field(default_factory=dict)
    window: int = 0
    seen: Seen | None = None

    def pruned(self, pruning: Pruning) -> PrunedCache:
        """The cache that a prefill under `pruning` would have left, with its report.

        pruning: of the model that read the prompt, with a policy that prunes the cache and looks
            at no more last tokens than were kept in mind
        Raises UnsupportedModeError for other policies.
        """
        made = pruning.policy
        if not made.prunes_cache or made.window > self.window:
            raise UnsupportedModeError(
                f"{type(made).__name__} cannot be planned afterwards: it changes the prompt's "
                "forward, or looks at more tokens than were remembered"
            )
        cache = PrunedCache(pruning.model)
        cache.shift = copy.copy(self.cache.shift)
        prefill = self._begun(cache, pruning)
        cache.layers = [self._layer(index, cache) for index in range(len(self.cache.layers))]
        views = {index: _narrow(view, made.window) for index, view in self.views.items()}
        parks = cache.shared.recall is not None
        cache.shared.spans = prefill.where.spans if parks else None
        planned = dict.fromkeys(views) if parks else plan_views(made, views)
        for index, plan in planned.items():
            plan = adopt_view(cache.layers[index], views[index], plan)
            prefill.plans[index] = (plan, views[index].spans, slot_positions(prefill, self.columns))
        cache._finish(replace(build_report(cache, prefill), seen=self.seen))
        return cache

    def _begun(self, cache: PrunedCache, pruning: Pruning) -> Prefill:
        """The state of a prefill that has located its images already."""
        prefill = cache._begin(self.columns, {}, pruning)
        spans = [view.spans for view in self.views.values()]
        found = spans[0] if spans else torch.zeros(len(self.first), self.columns).long()
        before = torch.zeros(len(self.first), device=found.device).long()
        images = int(found.max())
        prefill.located = Located(found, self.columns, before, images, bool(spans))
        return prefill

    def _layer(self, index: int, cache: PrunedCache) -> Any:
        layer = self.cache.layers[index]
        if not isinstance(layer, PrunedLayer):
            return copy.deepcopy(layer)
        own = PrunedLayer(layer.window, cache.shared)
        if index not in self.views:  # a prompt without images and padding
            own.store = copy.deepcopy(layer.store)
        own.is_initialized = True
        return own


def read(model: Any, inputs: Mapping[str, Tensor], window: int = 64) -> SharedPrefill:
    """Read a batch of prompts once. inputs: keyword arguments of `model.generate`.

    window: how many last prompt tokens the policies to come may look at, at most
    """
    witness = Witness(window)
    with prune(model, witness):
        prompt = read_into(PrunedCache(model), model, inputs)
    report = prompt.cache.report
    seen = None if report is None else report.seen
    return replace(prompt, views=witness.views, window=window, seen=seen)


def read_into(cache: PrunedCache, model: Any, inputs: Mapping[str, Tensor]) -> SharedPrefill:
    """Read a batch of prompts with whatever is attached; nothing can be planned of it again."""
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


def adopt(layer: PrunedLayer, keys: Tensor, values: Tensor, plan: KeepPlan) -> None:
    """Make a layer hold what a plan keeps of a prompt's keys and values (B, Hkv, N, D)."""
    layer.is_initialized = True
    layer.store = KVStore(keys, values, layer.window)
    layer.compact(plan)


def adopt_view(layer: PrunedLayer, view: LayerView, plan: KeepPlan | None) -> KeepPlan:
    """Make a layer hold what a plan keeps of a view; without one, what recall lets it hold."""
    assert view.keys is not None and view.values is not None
    if plan is None:
        layer.store = KVStore(view.keys, view.values, layer.window)
        plan = park_layer(layer, view)
    adopt(layer, view.keys, view.values, plan)
    return plan


def _narrow(view: LayerView, window: int) -> LayerView:
    """The view of a policy that asks for the last `window` tokens only."""
    if view.window is None or view.asked is None:
        return view
    last = min(window, view.window.shape[2])
    return replace(view, window=view.window[:, :, -last:], asked=view.asked[:, -last:])
