"""The attention function of attached modules: the model's own while it reads, ours while it writes.

While a prompt is read the original function runs untouched; its last token is scored beside it
and the layer's keys and values are compacted at once. Afterwards the layer attends to what it
kept, under a mask of its own: the model's masks are sized for a cache that was never pruned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plphp.attention import attend, last_token_probabilities
from plphp.cache import KVStore
from plphp.errors import (
    UnsupportedModeError,
    UnsupportedModelError,
    UnsupportedTransformersError,
)
from plphp.hf import compat
from plphp.hf.cache import PrunedCache, PrunedLayer
from plphp.hf.turn import Turn, slot_positions, slot_spans
from plphp.policy import LayerView

LAYER = "plphp_layer"  # keyword that carries the cache layer from the hook to the function
REFUSED = {"s_aux": "attention sinks", "position_bias": "position biases"}


class ConfigView:
    """A module's config, except that it names our attention function.

    Only the attached module sees it; the config object itself, which other models may share, is
    never written to.
    """

    _attn_implementation = compat.ATTENTION

    def __init__(self, module: nn.Module) -> None:
        self.original = module.config
        self.module_view = ModuleView(module, module.config)

    def __getattr__(self, name: str) -> Any:
        if name in ("original", "module_view"):  # not set yet: a copy or an unpickling
            raise AttributeError(name)
        return getattr(self.original, name)


class ModuleView:
    """An attached module as the original attention function expects it, with its own config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name in ("module", "config"):
            raise AttributeError(name)
        return getattr(self.module, name)


def pass_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attached module: hand its cache layer on to `pruned_attention`."""
    if "past_key_values" not in kwargs:
        raise UnsupportedTransformersError(
            f"{type(module).__name__} is no longer given its cache by keyword; "
            "this transformers version is not supported yet"
        )
    cache = kwargs["past_key_values"]
    if not isinstance(cache, PrunedCache):
        raise UnsupportedModeError(
            f"an attached model needs a plphp.PrunedCache, got {type(cache).__name__}: call the "
            "model itself and not a part of it, with use_cache=True, or remove() the pruning"
        )
    return args, {**kwargs, LAYER: cache.layers[module.layer_idx]}  # type: ignore[index]


def pruned_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface: query (B, H, T, D) -> output (B, T, H, Dv)."""
    view = module.config
    if not isinstance(view, ConfigView):
        raise UnsupportedModeError(
            "attn_implementation='plphp' is set by plphp.prune(model), not by hand"
        )
    if LAYER not in kwargs:
        raise UnsupportedTransformersError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention function"
        )
    layer = kwargs.pop(LAYER)
    if not isinstance(layer, PrunedLayer) or layer.raw:
        original = compat.original_attention(module, view.original)
        output, weights = original(view.module_view, query, key, value, attention_mask, **kwargs)
    else:
        output, weights = _attend(module, query, key, value, layer, kwargs), None
    if isinstance(layer, PrunedLayer) and layer.cache.turn is not None:
        with torch.no_grad():
            _prune(module, query, layer, layer.cache.turn, kwargs)
    return output, weights


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: PrunedLayer,
    kwargs: dict[str, Any],
) -> Tensor:
    assert layer.store is not None
    visible = layer.store.visible(query.shape[2])
    scale = _scale(module, query, kwargs)
    output = attend(query, key, value, visible, scale, compat.softcap(module.config, kwargs))
    return output.transpose(1, 2).contiguous()


def _prune(
    module: nn.Module, query: Tensor, layer: PrunedLayer, turn: Turn, kwargs: dict[str, Any]
) -> None:
    """Score the prompt's last token and compact, once the layer holds the whole prompt."""
    cache, store = layer.cache, layer.store
    if not isinstance(store, KVStore) or not turn.prunes or store.logical < turn.end:
        return
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} uses {what}; it cannot be scored")
    first = store.logical - query.shape[2]  # column of this forward's first query
    drafts = store.split(store.logical - turn.end)  # assisted decoding guesses past the prompt
    spans = slot_spans(turn, store.start, store.end)
    keys, _ = store.held()
    probs = last_token_probabilities(
        _last_queries(query, turn, first),
        keys,
        spans >= 0,
        _scale(module, query, kwargs),
        compat.softcap(module.config, kwargs),
    )
    index = int(module.layer_idx)  # type: ignore[arg-type]
    view = LayerView(probs, spans, keys.shape[1], index, len(cache.layers))
    if cache.over_ranks is not None:
        view = replace(view, over_ranks=cache.over_ranks)
    plan = cache.policy.plan(view)
    turn.plans[index] = (plan, spans, slot_positions(turn, store.end))
    longest = plan.columns.shape[-1]
    store.compact(plan, cache.reserve(longest, store.logical))
    store.append(*drafts)
    layer.raw = False
    if cache.static:
        layer.freeze()


def _last_queries(query: Tensor, turn: Turn, first: int) -> Tensor:
    """(B, H, D): each row's query of its last prompt token; queries (B, H, T, D) from `first`."""
    assert turn.spans is not None
    columns = torch.arange(turn.length, device=turn.spans.device)
    last = torch.where(turn.spans >= 0, columns, -1).amax(-1)
    place = last.to(query.device) + turn.begin - first
    return query[torch.arange(len(query), device=query.device), :, place]


def _scale(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> float:
    scale = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if scale is None else scale)
