"""What a method that chooses from hidden states is shown of a prompt."""

from __future__ import annotations

from torch import Tensor

from plphp.cache import KVStore
from plphp.hf.cache import PrunedCache
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Prefill
from plphp.policy import HiddenView


def hidden_view(cache: PrunedCache, prefill: Prefill, hidden: Tensor, index: int) -> HiddenView:
    """The view of the hidden states (B, N, E) that the layer with this index is given."""
    return HiddenView(
        hidden=hidden,
        spans=prefill.where.spans[:, -prefill.prompt.length :].to(hidden.device),
        layers=cache.shared.depth,
        keys=_keys(cache, index - 1, prefill.prompt.length),
    )


def _keys(cache: PrunedCache, index: int, columns: int) -> Tensor | None:
    """The keys (B, Hkv, N, D) of the prompt's columns in one layer; None if it holds none."""
    layer = cache.layers[index] if index >= 0 else None
    if not isinstance(layer, PrunedLayer) or not isinstance(layer.store, KVStore):
        return None
    return layer.store.held()[0][:, :, -columns:]
