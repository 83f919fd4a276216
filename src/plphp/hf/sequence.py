"""Hooks that remove tokens from the hidden states, for sequence methods (DivPrune, FastV, VTW).

A sequence method names a layer where tokens leave. Hooks on this layer and all after it reduce the
hidden states, the position embeddings and the mask to the columns that stay. A hook on the last
layer scatters its result back to the columns of the forward, so that the shapes outside the decoder
do not change. A method that chooses from hidden states does so in the hook of its layer, or before
layer 0 where the prompt comes in chunks, see `plan_ahead`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.hidden_view import hidden_view
from plphp.hf.plan_ahead import (
    choose_at_the_end,
    idle_while_planning,
    read_twice,
    reading,
    stop_here,
)
from plphp.hf.prompt import Prefill
from plphp.hf.remaining_tokens import select_columns
from plphp.hf.tower import without_marks
from plphp.policy import HiddenPolicy, SequencePolicy, sequence_stage
from plphp.policy.view import TEXT


def attach_sequence(
    pruning: Pruning, policy: SequencePolicy, layers: list[nn.Module]
) -> list[Callable[[], None]]:
    """Hook the layers that dropped tokens do not reach. Returns functions that remove the hooks.

    layers: all decoder layers, in order
    Raises InputError for options that do not fit this number of layers.
    """
    at = policy.leave_at(len(layers))
    chooses = policy if isinstance(policy, HiddenPolicy) else None
    handles = [
        layer.register_forward_pre_hook(
            partial(_take_out, pruning, index, index == at, chooses), with_kwargs=True
        )
        for index, layer in enumerate(layers)
        if index >= at
    ]
    if handles:
        handles.append(layers[-1].register_forward_hook(_put_back, with_kwargs=True))
    choose = None if chooses is None else partial(_choose, pruning, chooses)
    if read_twice(policy, len(layers)):
        plan = partial(choose_at_the_end, choose)
        handles.append(layers[at].register_forward_pre_hook(plan, with_kwargs=True, prepend=True))
        for layer in layers[at:]:
            pruning._set(layer, "forward", partial(idle_while_planning, layer.forward))
    elif choose is not None:
        plan = partial(stop_here, choose)
        handles.append(layers[0].register_forward_pre_hook(plan, with_kwargs=True, prepend=True))
    return [handle.remove for handle in handles]


def refuse_prompt(cache: PrunedCache, prefill: Prefill) -> None:
    """Raise UnsupportedModeError for a prompt that a sequence method cannot prune.

    Called in the forward that brings the prompt's last column.
    """
    first, shared = sequence_stage(cache.shared.policy), cache.shared
    if first is None or not prefill.where.prunes:
        return
    why = None
    if prefill.forward[0] and not prefill.ahead and not prefill.plans_now:
        why = "the prompt has to be read in one forward"
    elif not isinstance(first, HiddenPolicy):
        scores = [i for i in range(shared.depth) if first.scores_layer(i, shared.depth)]
        if not set(scores) <= set(shared.prunable):
            why = f"layer {scores[0]} cannot score the tokens: its attention does not cover them"
    if why is not None:
        raise UnsupportedModeError(f"{type(first).__name__} drops hidden states: {why}")


def _choose(
    pruning: Pruning, policy: HiddenPolicy, prefill: Prefill, cache: PrunedCache, hidden: Tensor
) -> None:
    """Let a method choose from the hidden states (B, N, E), and guessed tokens after them."""
    if prefill.located is None or not prefill.where.prunes:
        return
    new = prefill.where.spans[:, -prefill.prompt.length :]
    if not cache.static and not bool((new != TEXT).any()):
        return  # with recall, the images of earlier turns are located too
    view = hidden_view(pruning, policy, cache, prefill, hidden[:, : prefill.prompt.length])
    with torch.no_grad():
        plan = policy.choose(view)
    prefill.leave(plan, "flash" in cache.shared.config._attn_implementation)


def _take_out(
    pruning: Pruning,
    index: int,
    leaves: bool,
    chooses: HiddenPolicy | None,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a decoder layer: reduce its inputs to the columns that stay.

    index: of the layer; leaves: whether it is the first one that does not compute all columns
    chooses: the method that chooses the columns before this first layer, None if it has before
    """
    cache, prefill = reading(kwargs)
    if prefill is None or prefill.plans_now:
        return None
    if leaves and prefill.ahead:
        prefill.remaining = prefill.planned
    elif leaves and chooses is not None and args:
        _choose(pruning, chooses, prefill, cache, args[0])
    if (part := prefill.part) is None:
        return None
    if len(args) != 1 or "position_embeddings" not in kwargs:
        raise UnsupportedModelError(
            f"{type(module).__name__} needs more inputs than the hidden states, and plphp cannot "
            "reduce them to the tokens that stay: use a method that prunes the cache"
        )
    pruning.calls.remaining = part  # read by `drop_features` after the layer
    hidden = args[0]
    columns = part.columns.to(hidden.device)
    if leaves:
        marked = chooses is not None and chooses.reads_tower
        hidden = select_columns(hidden, -2, columns)
        hidden = without_marks(hidden) if marked else hidden
    attends = index in pruning.layers
    if not attends and part.plan.ragged and prefill.prompt.begin + prefill.forward[0]:
        raise UnsupportedModeError(
            f"layer {index} is recurrent and cannot skip a row's fillers after the first forward: "
            "use a batch of one row and larger chunks, or a method that prunes the cache"
        )
    mask = kwargs.get("attention_mask")
    # Without position_ids, because FlashAttention takes gaps between them for the borders of packed
    # sequences. The rotation needs only the embeddings.
    changed = {
        "position_embeddings": _each(kwargs["position_embeddings"], columns),
        "position_ids": None,
        "attention_mask": part.mask(mask, columns) if attends else part.flags(mask, columns),
    }
    return (hidden,), {**kwargs, **changed}


def _put_back(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the last layer: scatter its output to all columns, zeros elsewhere."""
    _, prefill = reading(kwargs)
    part = None if prefill is None or prefill.plans_now else prefill.part
    if part is None:
        return None
    hidden = output[0] if isinstance(output, tuple) else output
    columns = part.columns.to(hidden.device)
    # A filler has the column of a dropped token or of padding, where zeros are as good.
    whole = hidden.new_zeros(len(hidden), part.count, hidden.shape[-1])
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
