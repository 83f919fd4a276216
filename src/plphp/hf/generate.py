"""The methods of an attached model that plphp replaces: generate(), and those that it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.options import (
    Options,
    check_fits,
    drop_or_refuse,
    refuse_options,
    unsupported_options,
)
from plphp.hf.positions import later_positions
from plphp.hf.token_types import missing_types
from plphp.recall import Recall

BATCHES = (
    "batches continuously in a paged cache that pruning does not reach: use generate(), or vLLM "
    "with plphp's plugin"
)
SAVES = "would save a model that is attached: remove() the pruning first"
REFUSED_METHODS = {
    "generate_batch": BATCHES,
    "init_continuous_batching": BATCHES,
    "save_pretrained": SAVES,
    "push_to_hub": SAVES,
}


def wrap(pruning: Pruning, original: Callable[..., Any]) -> Callable[..., Any]:
    """The generate() of an attached model. It calls the original one with a pruned cache.

    The decoder layers cannot see where a prompt ends: it may come in chunks, or with guessed
    tokens after it. So the prompt is announced to the cache here, before the first forward.
    """

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = pruning.model
        kwargs = by_name(original, args, kwargs)
        options = Options(kwargs, getattr(model, "generation_config", None))
        refuse_options(options)
        refuse_checkpointing(pruning)
        cache = own_cache(kwargs, pruning)
        cache.check()
        kwargs = compat.with_cache(kwargs, compat.CACHE, cache)
        source, inputs = dict(kwargs), kwargs.get("inputs")
        if inputs is not None:
            source["input_ids" if inputs.dim() == 2 else "inputs_embeds"] = inputs
        if source.get("input_ids") is None and source.get("inputs_embeds") is None:
            # generate() starts from its own token, which is text. No vision token has the id -1.
            source["input_ids"] = torch.full((1, 1), -1, device=model.device)
        past = int(cache.get_seq_length())
        length = new_columns(source, past)
        found = missing_types(model, source, past, length)
        kwargs, source = {**kwargs, **found}, {**source, **found}
        cannot = unsupported_options(model, pruning.policy, cache, past)
        left_out = drop_or_refuse(options, cannot)
        if cache.static:
            check_fits(cache, past + length, options)
        cache._begin(length, source, pruning, generating=True)
        outer = vars(pruning.calls).copy()
        calls = pruning.calls
        calls.left_out, calls.condensed, calls.noted = left_out, False, []
        try:
            kwargs |= _positions(model, cache, past, length, source)
            said = original(**kwargs)
            if cache._order is None:  # otherwise the cache has the rows of another order, as beams
                cache._history.end(said, int(cache.get_seq_length()))
            return said
        finally:
            cache._settle()
            vars(pruning.calls).clear()
            vars(pruning.calls).update(outer)

    return generate


def _positions(
    model: Any, cache: PrunedCache, past: int, length: int, source: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The argument of a later turn in place of the positions of the model's last prompt.

    past, length, source: as of `later_positions`. It reads the sizes of the pixels, so the cache
        must have checked before that they belong to the new columns
    """
    positions = later_positions(model, cache.shift, past, length, source)
    if positions is None:
        return {}
    columns = length if source.get("input_ids") is None else source["input_ids"].shape[1]
    return {"position_ids": torch.nn.functional.pad(positions, (columns - length, 0))}


def merged_options(pruning: Pruning, original: Callable[..., Any]) -> Callable[..., Any]:
    """The model's method that merges options, changed to leave out what pruning cannot use.

    Such options are defaults of the checkpoint: if the call itself had given one, `refuse_options`
    or `drop_or_refuse` would have raised an error before.
    """

    @wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        config, rest = original(*args, **kwargs)
        config.use_cache, config.cache_implementation = True, None
        for name in getattr(pruning.calls, "left_out", ()):
            setattr(config, name, None)
        return config, rest

    return prepare


def own_cache(kwargs: Mapping[str, Any], pruning: Pruning) -> PrunedCache:
    """The cache that a call was given, or a new one if it was given none.

    kwargs: the arguments of the call, by name
    Raises UnsupportedModeError for a cache of another class, of another model, or made for another
    `recall`, and InputError for two caches.
    """
    cache = compat.given_cache(kwargs)
    given = (kwargs.get(name) for name in compat.CACHE_NAMES)
    if any(other is not None and other is not cache for other in given):
        raise InputError(f"{' and '.join(compat.CACHE_NAMES)} are two caches: give one of them")
    if cache is None:
        return PrunedCache(pruning.model)
    if not isinstance(cache, PrunedCache):
        raise UnsupportedModeError(
            f"an attached model cannot use a {type(cache).__name__}: pass "
            "cache=plphp.PrunedCache(model), or none"
        )
    if cache.config is not compat.text_config(pruning.model):
        raise UnsupportedModeError("this cache belongs to another model; make one for this model")
    if cache.shared.recall != pruning.recall:
        raise UnsupportedModeError(
            f"this cache was made {_with(cache.shared.recall)}, and the model is attached "
            f"{_with(pruning.recall)}: make a new plphp.PrunedCache, or attach the model as before"
        )
    if cache.shared.kept != pruning.kept:
        made, now = (kept or "no kv_bits" for kept in (cache.shared.kept, pruning.kept))
        raise UnsupportedModeError(
            f"this cache was made with {made}, and the model is attached with {now}: make a new "
            "plphp.PrunedCache, or attach the model as before"
        )
    return cache


def refuse_checkpointing(pruning: Pruning) -> None:
    """Raise UnsupportedModeError where gradient checkpointing would run without a cache."""
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in pruning.decoder):
        raise UnsupportedModeError(
            "gradient checkpointing in training mode runs the decoder without a cache, so nothing "
            "could be pruned: call model.eval() or switch checkpointing off first"
        )


def _with(recall: Recall | None) -> str:
    """How a message names a recall."""
    return "without recall" if recall is None else f"with recall={recall!r}"


def by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of a generate() by name. Raises TypeError for one that is given twice.

    Some models have a generate() of their own, whose positional arguments differ.
    """
    signature = inspect.signature(function)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature = inspect.signature(partial(GenerationMixin.generate, None))
    given = signature.bind_partial(*args).arguments
    if twice := given.keys() & kwargs:
        raise TypeError(f"generate() got multiple values for argument {min(twice)!r}")
    return {**given, **kwargs}


def new_columns(source: dict[str, Any], past: int) -> int:
    """The number of columns that a call adds to a cache that has seen `past` columns.

    As in transformers, the inputs repeat the whole conversation, unless the attention mask is
    longer than the ids: then only the new columns were passed.

    source: the arguments of the call, by name
    Raises InputError if no column is new, or if neither input_ids nor inputs_embeds is given.
    """
    for name in ("input_ids", "inputs_embeds"):
        given = source.get(name)
        if given is not None:
            mask = source.get("attention_mask")
            repeats = past and (mask is None or mask.shape[1] == given.shape[1])
            length = int(given.shape[1] - past if repeats else given.shape[1])
            if length < 1:
                raise InputError(
                    f"the prompt adds no token to the {past} that the cache has seen: pass the "
                    "whole conversation, or start a new plphp.PrunedCache"
                )
            return length
    raise InputError("a prompt needs input_ids or inputs_embeds")


def refuse_method(name: str, why: str) -> Callable[..., Any]:
    """A method that raises UnsupportedModeError, in place of one that pruning cannot support."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModeError(f"{name}() {why}")

    return refused
