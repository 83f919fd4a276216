"""Tokens that leave the hidden states: what sequence methods (FastV, VTW) do to a prompt.

Hooks on the decoder layers from the chosen one on take the planned columns out of the hidden
states and of whatever else comes with one entry a column; a hook on the last layer puts the result
back in its place, so that shapes outside the decoder stay what they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.cache import PrunedCache
from plphp.hf.prompt import Prefill
from plphp.hf.remaining_tokens import RemainingTokens, take
from plphp.policy import SequencePolicy


def decoder_layers(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """The decoder layers that hold these attention modules, in their order."""
    names = {module: name for name, module in model.named_modules()}
    return [model.get_submodule(names[module].rpartition(".")[0]) for module in modules]


def attach_sequence(policy: SequencePolicy, layers: list[nn.Module]) -> list[Callable[[], None]]:
    """Hook the layers that tokens do not reach; returns what takes the hooks off.

    Raises ValueError for options that do not fit so many layers.
    """
    at = policy.leave_at(len(layers))
    handles = [
        layer.register_forward_pre_hook(_take_out, with_kwargs=True) for layer in layers[at:]
    ]
    if handles:
        handles.append(layers[-1].register_forward_hook(_put_back, with_kwargs=True))
    return [handle.remove for handle in handles]


def refuse_prompt(cache: PrunedCache, prefill: Prefill, columns: int) -> None:
    """Raise UnsupportedModeError for a prompt that no token can leave.

    columns: of this forward
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
    """The tokens that stay of the prompt that is being read, once they are planned."""
    cache = compat.given_cache(kwargs)
    prefill = cache.shared.prefill if isinstance(cache, PrunedCache) else None
    return None if prefill is None else prefill.remaining


def _take_out(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    if len(args) != 1 or "position_embeddings" not in kwargs:
        raise UnsupportedModelError(
            f"{type(module).__name__} takes more than hidden states: tokens cannot leave it"
        )
    hidden = args[0]
    columns = remaining.columns.to(hidden.device)
    if hidden.shape[1] == remaining.prompt:
        hidden = take(hidden, -2, columns)
    # FlashAttention would read gaps between positions as the borders of packed sequences; the
    # rotation is in the embeddings already.
    changed = {
        "position_embeddings": _each(kwargs["position_embeddings"], columns),
        "position_ids": None,
        "attention_mask": remaining.mask(kwargs.get("attention_mask"), columns),
    }
    return (hidden,), {**kwargs, **changed}


def _put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    remaining = _remaining(kwargs)
    if remaining is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    columns = remaining.columns.to(hidden.device)
    whole = hidden.new_zeros(len(hidden), remaining.prompt, hidden.shape[-1])
    whole = whole.scatter(1, columns[..., None].expand_as(hidden), hidden)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _each(value: Any, columns: Tensor) -> Any:
    """Columns (B, K) of every tensor (..., B or 1, N, D) of a tuple."""
    if isinstance(value, Tensor):
        return take(value, -2, columns)
    return tuple(_each(part, columns) for part in value)
