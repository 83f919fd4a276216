"""What a method that chooses from hidden states is shown of a prompt."""

from __future__ import annotations

from torch import Tensor

from plphp.cache import KVStore
from plphp.hf.cache import PrunedCache
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Prefill, Prompt
from plphp.models import frames_of, processor_inputs
from plphp.policy import HiddenPolicy, HiddenView


def hidden_view(
    policy: HiddenPolicy, cache: PrunedCache, prefill: Prefill, hidden: Tensor, index: int
) -> HiddenView:
    """The view of the hidden states (B, N, E) that the layer with this index is given."""
    spans = prefill.where.spans[:, -prefill.prompt.length :].to(hidden.device)
    return HiddenView(
        hidden=hidden,
        spans=spans,
        frames=_frames(prefill.prompt, spans) if policy.reads_frames else None,
        layers=cache.shared.depth,
        keys=_keys(cache, index - 1, prefill.prompt.length),
    )


def _frames(prompt: Prompt, spans: Tensor) -> Tensor:
    """The frame (B, N) int64 of each vision token; beams repeat the rows of the prompt."""
    source = prompt.source
    ids, types = (
        None if tensor is None else tensor[:, -prompt.length :]
        for tensor in map(source.get, ("input_ids", "mm_token_type_ids"))
    )
    given = next((x for x in (ids, types) if x is not None), spans)
    repeats = len(spans) // len(given)
    own = spans[::repeats]
    found = frames_of(prompt.config, own, ids, types, processor_inputs(source))
    return found.repeat_interleave(repeats, dim=0)


def _keys(cache: PrunedCache, index: int, columns: int) -> Tensor | None:
    """The keys (B, Hkv, N, D) of the prompt's columns in one layer; None if it holds none."""
    layer = cache.layers[index] if index >= 0 else None
    if not isinstance(layer, PrunedLayer) or not isinstance(layer.store, KVStore):
        return None
    return layer.store.held()[0][:, :, -columns:]
