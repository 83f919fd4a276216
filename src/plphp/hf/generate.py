"""What an attached model's generate() accepts, and what it refuses with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache, own_cache
from plphp.hf.positions import later_positions
from plphp.policy import Policy

ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
UNSUPPORTED_METHODS = ("generate_batch", "init_continuous_batching")


def wrap(pruning: Pruning, original: Callable[..., Any]) -> Callable[..., Any]:
    """A generate() that gives the original one a pruned cache and knows where the prompt ends."""

    def generate(
        inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        model = pruning.model
        refuse(model, generation_config, kwargs)
        if not pruning.policy.prunes_cache:
            refuse_pieces(pruning.policy, generation_config, kwargs)
        # "dynamic" asks for what we bring anyway, but may not stand beside a cache.
        kwargs.pop("cache_implementation", None)
        if getattr(generation_config, "cache_implementation", None) is not None:
            generation_config = copy.copy(generation_config)
            generation_config.cache_implementation = None
        cache = own_cache(compat.given_cache(kwargs), model)
        cache.check()
        kwargs = compat.with_cache(kwargs, compat.CACHE, cache)
        source = dict(kwargs)
        if inputs is not None:
            source["input_ids" if inputs.dim() == 2 else "inputs_embeds"] = inputs
        if source.get("input_ids") is None and source.get("inputs_embeds") is None:
            # generate() begins with a token of its own: text, whatever its id
            source["input_ids"] = torch.full((1, 1), -1, device=model.device)
        past = int(cache.get_seq_length())
        length = new_columns(source, past)
        positions = later_positions(model, cache.shift, past, length, source)
        if positions is not None:  # else generate() would take those of the model's last prompt
            columns = length if source.get("input_ids") is None else source["input_ids"].shape[1]
            kwargs["position_ids"] = torch.nn.functional.pad(positions, (columns - length, 0))
        if cache.static:
            _fit(cache, past + length, kwargs)
        cache.begin(length, source, pruning, generating=True)
        try:
            return original(inputs, generation_config, *args, **kwargs)
        finally:
            cache.settle()

    return generate


def _fit(cache: PrunedCache, prompt: int, kwargs: dict[str, Any]) -> None:
    """Raise for an answer that a static cache cannot hold or take back."""
    if any(kwargs.get(name) is not None for name in ASSISTED):
        raise UnsupportedModeError("assisted decoding takes tokens back: use static=False")
    answer = kwargs.get("max_new_tokens")
    if answer is not None and cache.max_len is not None and prompt + answer - 1 > cache.max_len:
        raise ValueError(
            f"{prompt} columns and {answer} new tokens do not fit max_len={cache.max_len}"
        )


def refuse_pieces(policy: Policy, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModeError where a prompt would not be read alone and in one forward."""
    for name in (*ASSISTED, "prefill_chunk_size"):
        if (kwargs.get(name) or getattr(generation_config, name, None)) is not None:
            raise UnsupportedModeError(
                f"{type(policy).__name__} drops hidden states: {name} would split the prompt or "
                "add to it; drop it, or use a method that prunes the cache"
            )


def refuse(model: nn.Module, generation_config: Any, kwargs: dict[str, Any]) -> None:
    """Raise UnsupportedModeError for a mode that pruning cannot serve, before anything runs."""

    def option(name: str) -> Any:
        for source in (generation_config, getattr(model, "generation_config", None)):
            if name in kwargs:
                return kwargs[name]
            if getattr(source, name, None) is not None:
                return getattr(source, name)
        return None

    if option("use_cache") is False:
        raise UnsupportedModeError("use_cache=False leaves no cache to prune; drop it or remove()")
    kind = option("cache_implementation")
    if kind not in (None, "dynamic"):
        raise UnsupportedModeError(
            f"cache_implementation={kind!r} brings a cache of its own; drop it: an attached model "
            "makes a plphp.PrunedCache"
        )
    own = getattr(model, "generation_config", None)
    if getattr(own, "cache_implementation", None) is not None:
        # generate() merges it into whatever is passed, and refuses it beside our cache.
        raise UnsupportedModeError(
            "model.generation_config.cache_implementation is set; set it to None, the default: an "
            "attached model makes a plphp.PrunedCache"
        )
    if option("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True is not available: dropped tokens have no attention to return"
        )
    if isinstance(kwargs.get("custom_generate"), str):
        raise UnsupportedModeError(
            "custom_generate code from a hub may bypass the cache; pass none, or remove()"
        )


def new_columns(source: dict[str, Any], past: int) -> int:
    """Columns that this call adds to a cache that has seen `past`, as transformers counts them.

    Prompts repeat the conversation, unless an attention mask longer than the ids says that only
    what is new was passed.
    """
    for name in ("input_ids", "inputs_embeds"):
        given = source.get(name)
        if given is not None:
            mask = source.get("attention_mask")
            repeats = past and (mask is None or mask.shape[1] == given.shape[1])
            length = int(given.shape[1] - past if repeats else given.shape[1])
            if length < 1:
                raise ValueError(f"the prompt adds no token to the {past} that the cache has seen")
            return length
    raise ValueError("a prompt needs input_ids or inputs_embeds")


def refuse_method(name: str) -> Callable[..., Any]:
    """A stand-in for a method of the model that would silently not prune."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModeError(
            f"{name}() batches continuously in a paged cache that pruning does not reach: use "
            "generate(), or vLLM with plphp's plugin"
        )

    return refused
