"""Hooks that remove tokens from the hidden states, for sequence methods (FastV, VTW).

A sequence method names a layer where tokens leave. Hooks on this layer and all after it reduce the
hidden states, the position embeddings and the mask to the columns that stay. A hook on the last
layer scatters its result back to the columns of the prompt, so that the shapes outside the decoder
do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.cache import PrunedCache
from plphp.hf.prompt import Prefill
from plphp.hf.remaining_tokens import RemainingTokens, select_columns
from plphp.policy import SequencePolicy


def decoder_layers(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """The decoder layers that contain these attention modules, in the same order."""
    names = {module: name for name, module in model.named_modules()}
    return [model.get_submodule(names[module].rpartition(".")[0]) for module in modules]


def attach_sequence(policy: SequencePolicy, layers: list[nn.Module]) -> list[Callable[[], None]]:
    """Hook the layers that dropped tokens do not reach. Returns functions that remove the hooks.

    layers: all decoder layers, in order
    Raises ValueError for options that do not fit this number of layers.
    """
    at = policy.leave_at(len(layers))
    handles = [
        layer.register_forward_pre_hook(_take_out, with_kwargs=True) for layer in layers[at:]
    ]
    if handles:
        handles.append(layers[-1].register_forward_hook(_put_back, with_kwargs=True))
    return [handle.remove for handle in handles]


def refuse_prompt(cache: PrunedCache, prefill: Prefill, columns: int) -> None:
    """Raise UnsupportedModeError for a prompt that a sequence method cannot prune.

    columns: how many columns this forward brings
    """
    if cache.shared.policy.kind != "sequence" or not prefill.where.prunes:
        return
    prompt, why = prefill.prompt, None
    if columns != prompt.length:
        why = "the prompt has to be read in one forward, without chunks and drafts"
    elif prompt.begin > 0 and prefill.where.images > 0:
        why = "new images in a later turn are not supported; start a new cache"
    elif cache.static:
        why = "a static cache is not supported; use static=False"
    elif len(cache.shared.prunable) < len(cache.layers):
        why = "some layers cannot be pruned (their attention does not cover the prompt)"
    if why is not None:
        raise UnsupportedModeError(
            f"{type(cache.shared.policy).__name__} drops hidden states: {why}"
        )


def _remaining(kwargs: dict[str, Any]) -> RemainingTokens | None:
    """The tokens that stay in the hidden states, None before they are planned."""
    cache = compat.given_cache(kwargs)
    prefill = cache.shared.prefill if isinstance(cache, PrunedCache) else None
    return None if prefill is None else prefill.remaining


def _take_out(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a decoder layer: reduce its inputs to the columns that stay."""
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    if len(args) != 1 or "position_embeddings" not in kwargs:
        raise UnsupportedModelError(
            f"{type(module).__name__} needs more inputs than the hidden states, and plphp cannot "
            "reduce them to the tokens that stay: use a method that prunes the cache"
        )
    hidden = args[0]
    columns = remaining.columns.to(hidden.device)
    if hidden.shape[1] == remaining.prompt:
        hidden = select_columns(hidden, -2, columns)
    # Without position_ids, because FlashAttention takes gaps between them for the borders of packed
    # sequences. The rotation needs only the embeddings.
    changed = {
        "position_embeddings": _each(kwargs["position_embeddings"], columns),
        "position_ids": None,
        "attention_mask": remaining.mask(kwargs.get("attention_mask"), columns),
    }
    return (hidden,), {**kwargs, **changed}


def _put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the last layer: scatter its output to all columns, zeros elsewhere."""
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    columns = remaining.columns.to(hidden.device)
    whole = hidden.new_zeros(len(hidden), remaining.prompt, hidden.shape[-1])
    whole = whole.scatter(1, columns[..., None].expand_as(hidden), hidden)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _each(value: Any, columns: Tensor) -> Any:
    """A tensor (..., B or 1, N, D), or each one of a tuple, reduced to the columns (B, K)."""
    if isinstance(value, Tensor):
        return select_columns(value, -2, columns)
    return tuple(_each(part, columns) for part in value)
