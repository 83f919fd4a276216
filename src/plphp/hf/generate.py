"""What an attached model's generate() accepts, and what it refuses with a reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from transformers import GenerationMixin

from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.cache import PrunedCache
from plphp.hf.positions import later_positions
from plphp.policy import Policy
from plphp.recall import Recall

DRAFTS = (
    "assistant_model",
    "prompt_lookup_num_tokens",
    "assistant_early_exit",
    "use_mtp",
)  # options of assisted decoding
FROM_HUB = ("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "num_beam_groups")
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


@dataclass(frozen=True)
class Options:
    """The options of one generate(): what the call asks for, and what is the model's default.

    A generation config that is passed counts as the call where it differs from the model's own:
    pipelines pass a copy of that one.
    """

    kwargs: Mapping[str, Any]
    default: Any

    def asked(self, name: str) -> Any:
        """What the call asks for, None where it does not say."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        passed = getattr(self.kwargs.get("generation_config"), name, None)
        return None if passed == getattr(self.default, name, None) else passed

    def value(self, name: str) -> Any:
        """What holds in the end, None where nothing is said."""
        asked = self.asked(name)
        return getattr(self.default, name, None) if asked is None else asked


def wrap(pruning: Pruning, original: Callable[..., Any]) -> Callable[..., Any]:
    """A generate() that gives the original one a pruned cache and knows where the prompt ends."""

    @wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = pruning.model
        kwargs = by_name(original, args, kwargs)
        options = Options(kwargs, getattr(model, "generation_config", None))
        refuse(options)
        refuse_checkpointing(pruning)
        cache = own_cache(compat.given_cache(kwargs), pruning)
        cache.check()
        kwargs = compat.with_cache(kwargs, compat.CACHE, cache)
        source, inputs = dict(kwargs), kwargs.get("inputs")
        if inputs is not None:
            source["input_ids" if inputs.dim() == 2 else "inputs_embeds"] = inputs
        if source.get("input_ids") is None and source.get("inputs_embeds") is None:
            # generate() begins with a token of its own: text, whatever its id
            source["input_ids"] = torch.full((1, 1), -1, device=model.device)
        past = int(cache.get_seq_length())
        length = new_columns(source, past)
        left_out = drop_or_refuse(options, impossible(pruning.policy, cache, past))
        positions = later_positions(model, cache.shift, past, length, source)
        if positions is not None:  # else generate() would take those of the model's last prompt
            columns = length if source.get("input_ids") is None else source["input_ids"].shape[1]
            kwargs["position_ids"] = torch.nn.functional.pad(positions, (columns - length, 0))
        if cache.static:
            _fit(cache, past + length, options)
        cache._begin(length, source, pruning, generating=True)
        outer = vars(pruning.calls).copy()
        pruning.calls.left_out = left_out
        try:
            return original(**kwargs)
        finally:
            cache._settle()
            vars(pruning.calls).clear()
            vars(pruning.calls).update(outer)

    return generate


def merged_options(pruning: Pruning, original: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' merging of options, and then without those that our cache takes the place of.

    What a call asked for has been refused by now: these are defaults of the checkpoint.
    """

    @wraps(original)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        config, rest = original(*args, **kwargs)
        config.use_cache, config.cache_implementation = True, None
        for name in getattr(pruning.calls, "left_out", ()):
            setattr(config, name, None)
        return config, rest

    return prepare


def own_cache(cache: Any, pruning: Pruning) -> PrunedCache:
    """The cache that a call brought, or a new one. Raises UnsupportedModeError for any other."""
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
    return cache


def refuse_checkpointing(pruning: Pruning) -> None:
    """Raise UnsupportedModeError where decoder layers would throw their cache away."""
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in pruning.decoder):
        raise UnsupportedModeError(
            "gradient checkpointing in training mode runs the decoder without a cache, so nothing "
            "could be pruned: call model.eval() or switch checkpointing off first"
        )


def _with(recall: Recall | None) -> str:
    return "without recall" if recall is None else f"with recall={recall!r}"


def by_name(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments by name. Some models' generate() names other positions than transformers'."""
    signature = inspect.signature(function)
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        signature = inspect.signature(partial(GenerationMixin.generate, None))
    given = signature.bind_partial(*args).arguments
    if twice := given.keys() & kwargs:
        raise TypeError(f"generate() got multiple values for argument {min(twice)!r}")
    return {**given, **kwargs}


def _fit(cache: PrunedCache, prompt: int, options: Options) -> None:
    """Raise InputError for an answer that a static cache cannot hold."""
    answer, most = options.value("max_new_tokens"), options.value("max_length")
    if answer is None and most is not None:
        answer = most - prompt
    if answer is not None and cache.max_len is not None and prompt + answer - 1 > cache.max_len:
        raise InputError(
            f"{prompt} columns and {answer} new tokens do not fit max_len={cache.max_len}"
        )


def impossible(policy: Policy, cache: PrunedCache, past: int) -> dict[str, str]:
    """Options that this conversation cannot have, and why.

    All of them are about speed: the answer is the same without them.
    """
    why = None
    if not policy.prunes_cache:
        why = (
            f"{type(policy).__name__} drops hidden states, and this would split the prompt or add "
            "to it: leave it out, or use a method that prunes the cache"
        )
        return dict.fromkeys((*DRAFTS, "prefill_chunk_size"), why)
    if cache.static:
        why = "assisted decoding takes tokens back: use static=False"
    elif past:
        why = (
            "assisted decoding reads the whole conversation again where a cache holds it, in "
            "transformers itself: leave it out of later turns, or start a new cache"
        )
    elif compat.is_recurrent(cache.config):
        why = (
            "assisted decoding takes tokens back, which the recurrent layers of this model cannot: "
            "leave it out"
        )
    return {} if why is None else dict.fromkeys(DRAFTS, why)


def drop_or_refuse(options: Options, reasons: Mapping[str, str]) -> tuple[str, ...]:
    """The defaults of the checkpoint that have to be left out, by name.

    Raises UnsupportedModeError for one that the call asks for.
    """
    for name, why in reasons.items():
        if options.asked(name) not in (None, False):
            raise UnsupportedModeError(f"{name}: {why}")
    return tuple(name for name in reasons if name != "assistant_model")


def refuse(options: Options) -> None:
    """Raise UnsupportedModeError for a mode that pruning cannot serve, before anything runs.

    A default of the checkpoint that only concerns caches gives way to ours and is not refused.
    """
    if options.asked("use_cache") is False:
        raise UnsupportedModeError("use_cache=False leaves no cache to prune; drop it or remove()")
    kind = options.asked("cache_implementation")
    if kind not in (None, "dynamic"):
        raise UnsupportedModeError(
            f"cache_implementation={kind!r} brings a cache of its own; drop it: an attached model "
            "makes a plphp.PrunedCache"
        )
    if options.value("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True is not available: dropped tokens have no attention to return"
        )
    if options.value("token_healing"):
        raise UnsupportedModeError(
            "token_healing=True rewrites the end of the prompt, which pruning is decided by: drop "
            "it, or remove()"
        )
    for name in FROM_HUB:
        if options.value(name) not in (None, 0, 1, False):
            raise UnsupportedModeError(
                f"{name} runs code from a hub, which may bypass the cache: drop it, or remove()"
            )
    if isinstance(options.kwargs.get("custom_generate"), str):
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


def refuse_method(name: str, why: str) -> Callable[..., Any]:
    """A stand-in for a method of the model that would not prune, or would save hooks."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModeError(f"{name}() {why}")

    return refused
