"""The attention function of attached modules: the model's own during prefill, plphp's in decoding.

During prefill the model's own attention function runs unchanged. Its result does not contain the
scores that a policy needs, so the last prompt tokens are scored separately; then the layer's keys
and values are compacted. Afterwards plphp's attention reads what the layer kept, under a mask made
from the layer's own lengths: the model's masks have the size of a cache that was never pruned.
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

# The keyword argument with which the hook hands the cache layer on to the attention function.
LAYER = "plphp_layer"


class ConfigView:
    """A module's config that names plphp's attention function and is the original in all else.

    Only the attached module uses it. The original config object is never written to, since other
    models may share it.
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
    """An attached module with its original config, for the model's own attention function.

    That function may read the name of the attention implementation from the config.
    """

    def __init__(self, module: nn.Module, config: Any) -> None:
        self.module = module
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def pass_layer(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of an attached module: hand its cache layer on to `pruned_attention`.

    Raises UnsupportedTransformersError where the module is not given its cache by keyword, and
    UnsupportedModeError for a cache that is no PrunedCache.
    """
    cache = compat.given_cache(kwargs)
    if cache is None and not any(name in kwargs for name in compat.CACHE_NAMES):
        raise UnsupportedTransformersError(
            f"{type(module).__name__} is no longer given its cache by keyword; "
            "this transformers version is not supported yet"
        )
    if not isinstance(cache, PrunedCache):
        raise UnsupportedModeError(
            f"an attached model needs a plphp.PrunedCache, got {type(cache).__name__}: call the "
            "model that plphp.prune was given, not a part of it or a model around it, with "
            "use_cache=True; or remove() the pruning"
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
    """transformers' attention interface, for the attached modules.

    query: (B, H, T, D)
    key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), what `PrunedLayer.update` returned
    attention_mask: the model's own, in the form that its own attention function takes

    Returns the output (B, T, H, Dv), and the attention weights or None. Raises
    UnsupportedModeError in a module that `plphp.prune` has not attached to, and
    UnsupportedTransformersError where the module did not pass its keyword arguments on.
    """
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
        mask = _mask_of_new_columns(attention_mask, query.shape[2])
        output, weights = _attend(module, query, mask, layer, kwargs), None
    if isinstance(layer, PrunedLayer):
        with torch.no_grad():
            if layer.shared.watch is not None:
                layer.shared.watch(module, query, layer, kwargs)
            if layer.shared.prefill is not None:
                after_attention(module, query, layer, layer.shared.prefill, kwargs)
    return output, weights


def _mask_of_new_columns(mask: Any, queries: int) -> Tensor | None:
    """(B or 1, 1, T, T) bool: which of a later turn's T columns attend to which of them.

    None where each attends to itself and all before it. The model's own mask also covers padding
    between turns and images whose tokens attend to each other in both directions. Its last T
    columns are those of this turn, whatever was dropped of earlier ones.
    """
    if queries == 1 or not isinstance(mask, Tensor):
        return None
    block = mask[..., -queries:]
    if block.dim() == 2:  # FlashAttention's: which columns are tokens
        order = torch.arange(queries, device=block.device)
        seen = (order < order[:, None]) & (block[:, None] > 0)
        return (seen | (order == order[:, None]))[:, None]
    return block if block.dtype == torch.bool else block == 0


def _attend(
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    layer: PrunedLayer,
    kwargs: dict[str, Any],
) -> Tensor:
    """Attention (B, T, H, Dv) of queries (B, H, T, D) to what a pruned layer holds."""
    assert layer.store is not None
    scale, softcap = compat.scale(query, kwargs), compat.softcap(module.config, kwargs)
    if layer.parked is not None:
        assert isinstance(layer.store, KVStore)
        output = layer.parked.attend(query, layer.store, scale, softcap)
    elif layer.codes is not None and not layer.decoded:
        assert isinstance(layer.store, KVStore)
        output = layer.codes.attend(query, layer.store, scale, softcap)
    else:
        output = decode_attention(query, layer.store, scale, softcap, mask)
    return output.transpose(1, 2).contiguous()
