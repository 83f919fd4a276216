"""The attention function of attached modules: the model's own while it reads, ours while it writes.

While a prompt is read the original function runs untouched; its last token is scored beside it
and the layer's keys and values are compacted at once. Afterwards the layer attends to what it
kept, under a mask of its own: the model's masks are sized for a cache that was never pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plphp.attention import decode_attention
from plphp.cache import KVStore
from plphp.errors import (
    UnsupportedModeError,
    UnsupportedTransformersError,
)
from plphp.hf import compat
from plphp.hf.attached import COPIED, SAVED
from plphp.hf.cache import PrunedCache
from plphp.hf.layer import PrunedLayer
from plphp.hf.prefill import after_attention

LAYER = "plphp_layer"  # keyword that carries the cache layer from the hook to the function


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
        return getattr(self.original, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedModeError(COPIED)

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(SAVED)


class ModuleView:
    """An attached module as the original attention function expects it, with its own config."""

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def pass_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attached module: hand its cache layer on to `pruned_attention`."""
    cache = compat.given_cache(kwargs)
    if cache is None and not any(name in kwargs for name in compat.CACHE_NAMES):
        raise UnsupportedTransformersError(
            f"{type(module).__name__} is no longer given its cache by keyword; "
            "this transformers version is not supported yet"
        )
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
        among = _among(attention_mask, query.shape[2])
        output, weights = _attend(module, query, among, layer, kwargs), None
    if isinstance(layer, PrunedLayer):
        with torch.no_grad():
            if layer.shared.watch is not None:
                layer.shared.watch(module, query, layer, kwargs)
            if layer.shared.prefill is not None:
                after_attention(module, query, layer, layer.shared.prefill, kwargs)
    return output, weights


def _among(mask: Any, queries: int) -> Tensor | None:
    """(B or 1, 1, T, T) bool: what a later turn's columns see of each other, None if all before.

    The model's own mask knows of padding between turns and of images that see themselves in both
    directions. Its last columns are this turn's, whatever was dropped before.
    """
    if queries == 1 or not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    block = mask[..., -queries:]
    return block if block.dtype == torch.bool else block == 0


def _attend(
    module: nn.Module,
    query: Tensor,
    among: Tensor | None,
    layer: PrunedLayer,
    kwargs: dict[str, Any],
) -> Tensor:
    assert layer.store is not None
    scale, softcap = compat.scale(query, kwargs), compat.softcap(module.config, kwargs)
    if layer.parked is not None:
        assert isinstance(layer.store, KVStore)
        output = layer.parked.attend(query, layer.store, scale, softcap)
    else:
        output = decode_attention(query, layer.store, scale, softcap, among)
    return output.transpose(1, 2).contiguous()
