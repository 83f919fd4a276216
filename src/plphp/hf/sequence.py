"""Hooks that remove tokens from the hidden states, for sequence methods (DivPrune, FastV, VTW).

A sequence method names a layer where tokens leave. Hooks on this layer and all after it reduce the
hidden states, the position embeddings and the mask to the columns that stay. A hook on the last
layer scatters its result back to the columns of the prompt, so that the shapes outside the decoder
do not change. A method that chooses from hidden states does so in the hook of its layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.hidden_view import hidden_view
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Prefill
from plphp.hf.remaining_tokens import RemainingTokens, select_columns
from plphp.policy import HiddenPolicy, SequencePolicy, sequence_stage
from plphp.policy.view import TEXT


def attach_sequence(
    pruning: Pruning, policy: SequencePolicy, layers: list[nn.Module]
) -> list[Callable[[], None]]:
    """Hook the layers that dropped tokens do not reach. Returns functions that remove the hooks.

    layers: all decoder layers, in order
    Raises ValueError for options that do not fit this number of layers.
    """
    at = policy.leave_at(len(layers))
    chooses = policy if isinstance(policy, HiddenPolicy) else None
    handles = [
        layer.register_forward_pre_hook(
            partial(_take_out, pruning, index, chooses if index == at else None), with_kwargs=True
        )
        for index, layer in enumerate(layers)
        if index >= at
    ]
    if handles:
        handles.append(layers[-1].register_forward_hook(_put_back, with_kwargs=True))
    return [handle.remove for handle in handles]


def refuse_prompt(cache: PrunedCache, prefill: Prefill, columns: int) -> None:
    """Raise UnsupportedModeError for a prompt that a sequence method cannot prune.

    columns: how many columns this forward brings
    """
    first, shared = sequence_stage(cache.shared.policy), cache.shared
    if first is None or not prefill.where.prunes:
        return
    prompt, why = prefill.prompt, None
    if columns != prompt.length:
        why = "the prompt has to be read in one forward, without chunks and drafts"
    elif prompt.begin and any(slides(layer, prompt.end) for _, layer in cache.pruned_layers()):
        why = "later turns with images exceed the sliding window of some layers; use a new cache"
    elif not isinstance(first, HiddenPolicy):
        scores = [i for i in range(shared.depth) if first.scores_layer(i, shared.depth)]
        if not set(scores) <= set(shared.prunable):
            why = f"layer {scores[0]} cannot score the tokens: its attention does not cover them"
    if why is not None:
        raise UnsupportedModeError(f"{type(first).__name__} drops hidden states: {why}")


def slides(layer: PrunedLayer, columns: int) -> bool:
    """Whether a layer's window is shorter than a conversation of this many columns."""
    return layer.window is not None and layer.window < columns


def _remaining(kwargs: dict[str, Any]) -> RemainingTokens | None:
    """The tokens that stay in the hidden states, None before they are planned."""
    cache = compat.given_cache(kwargs)
    prefill = cache.shared.prefill if isinstance(cache, PrunedCache) else None
    return None if prefill is None else prefill.remaining


def _choose(policy: HiddenPolicy, hidden: Tensor, kwargs: dict[str, Any], index: int) -> None:
    """Let a method choose from the hidden states (B, N, E) before the layer with this index."""
    cache = compat.given_cache(kwargs)
    prefill = cache.shared.prefill if isinstance(cache, PrunedCache) else None
    if prefill is None or prefill.located is None or not prefill.where.prunes:
        return
    view = hidden_view(policy, cache, prefill, hidden, index)
    if not cache.static and not bool((view.spans != TEXT).any()):
        return  # with recall, the images of earlier turns are located too
    plan = policy.choose(view)
    prefill.leave(plan, "flash" in cache.shared.config._attn_implementation)


def _take_out(
    pruning: Pruning,
    index: int,
    chooses: HiddenPolicy | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a decoder layer: reduce its inputs to the columns that stay.

    index: of the layer; chooses: the method that chooses these columns before this layer, or None
    """
    if chooses is not None and args:
        _choose(chooses, args[0], kwargs, index)
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    if len(args) != 1 or "position_embeddings" not in kwargs:
        raise UnsupportedModelError(
            f"{type(module).__name__} needs more inputs than the hidden states, and plphp cannot "
            "reduce them to the tokens that stay: use a method that prunes the cache"
        )
    pruning.calls.remaining = remaining  # read by `drop_features` after the layer
    hidden = args[0]
    columns = remaining.columns.to(hidden.device)
    if hidden.shape[1] == remaining.prompt:
        hidden = select_columns(hidden, -2, columns)
    attends = index in pruning.layers
    mask = kwargs.get("attention_mask")
    # Without position_ids, because FlashAttention takes gaps between them for the borders of packed
    # sequences. The rotation needs only the embeddings.
    changed = {
        "position_embeddings": _each(kwargs["position_embeddings"], columns),
        "position_ids": None,
        "attention_mask": remaining.mask(mask, columns)
        if attends
        else remaining.flags(mask, columns),
    }
    return (hidden,), {**kwargs, **changed}


def _put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the last layer: scatter its output to all columns, zeros elsewhere."""
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    columns = remaining.columns.to(hidden.device)
    # A filler has the column of a dropped token or of padding, where zeros are as good.
    whole = hidden.new_zeros(len(hidden), remaining.prompt, hidden.shape[-1])
    whole = whole.scatter(1, columns[..., None].expand_as(hidden), hidden)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def drop_features(
    pruning: Pruning, original: Callable[..., Any], hidden: Tensor, mask: Tensor, features: Tensor
) -> Any:
    """DeepStack (Qwen3-VL): add the features of the vision tokens that stay, and of no others.

    original: the method of the language model that adds features to the hidden states
    hidden: (B, N or K, E); mask: (B, N) bool, the vision tokens; features: (V, E)
    """
    remaining = getattr(pruning.calls, "remaining", None)
    if remaining is not None:
        mask, features = remaining.added(mask, features)
    return original(hidden, mask, features)


def _each(value: Any, columns: Tensor) -> Any:
    """A tensor (..., B or 1, N, D), or each one of a tuple, reduced to the columns (B, K)."""
    if isinstance(value, Tensor):
        return select_columns(value, -2, columns)
    return tuple(_each(part, columns) for part in value)
