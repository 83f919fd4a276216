"""The options of generate() on an attached model: which are refused, and which are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.cache import PrunedCache
from plphp.hf.plan_ahead import PREFILL
from plphp.policy import Policy, sequence_stage

# Options that ask for assisted decoding.
DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
# Options for which transformers runs code from a hub, with generate() loops of its own.
CODE_FROM_HUB = (
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "num_beam_groups",
)


@dataclass(frozen=True)
class Options:
    """The options of one call of generate(): those of the call, and the model's defaults.

    A value in a generation config that the call passes counts as an option of the call only if it
    differs from the model's own generation config, because pipelines pass a copy of the latter.

    kwargs: the arguments of the call, by name
    default: the model's generation config, or None
    """

    kwargs: Mapping[str, Any]
    default: Any

    def of_call(self, name: str) -> Any:
        """The value that the call gives to an option, None if it gives none."""
        if self.kwargs.get(name) is not None:
            return self.kwargs[name]
        passed = getattr(self.kwargs.get("generation_config"), name, None)
        return None if passed == getattr(self.default, name, None) else passed

    def value(self, name: str) -> Any:
        """The value that generate() uses: the call's, or the default; None if there is neither."""
        value = self.of_call(name)
        return getattr(self.default, name, None) if value is None else value


def check_fits(cache: PrunedCache, prompt: int, options: Options) -> None:
    """Raise InputError for an answer that a static cache cannot hold.

    prompt: columns of the conversation up to the end of the prompt
    """
    answer, max_length = options.value("max_new_tokens"), options.value("max_length")
    if answer is None and max_length is not None:
        answer = max_length - prompt
    if answer is not None and cache.max_len is not None and prompt + answer - 1 > cache.max_len:
        raise InputError(
            f"{prompt} columns and {answer} new tokens do not fit max_len={cache.max_len}"
        )


def unsupported_options(
    model: Any, policy: Policy, cache: PrunedCache, past: int
) -> dict[str, str]:
    """Options that cannot be used with this policy and cache, and the reason for each.

    All of them only change the speed: the answer is the same without them.

    past: columns that the cache has seen
    """
    why = no_chunks(model, policy)
    return no_drafts(cache, past) | ({} if why is None else {"prefill_chunk_size": why})


def no_chunks(model: Any, policy: Policy) -> str | None:
    """Why the prompt cannot be read in chunks, None if it can."""
    first = sequence_stage(policy)
    if first is None or hasattr(model, PREFILL):
        return None
    return (
        f"{type(first).__name__} chooses before the chunks are read, in a method of transformers "
        f"that {type(model).__name__} has not: leave it out"
    )


def no_drafts(cache: PrunedCache, past: int) -> dict[str, str]:
    """The options of assisted decoding that cannot be used, and the reason for each.

    past: columns that the cache has seen
    """
    why = None
    if cache.static:
        why = "assisted decoding takes tokens back: use static=False"
    elif past:
        why = (
            "with a cache of earlier turns, transformers' assisted decoding reads the whole "
            "conversation again: leave it out of later turns, or start a new cache"
        )
    elif compat.is_recurrent(cache.config):
        why = (
            "assisted decoding takes tokens back, which the recurrent layers of this model cannot: "
            "leave it out"
        )
    return {} if why is None else dict.fromkeys(DRAFTS, why)


def drop_or_refuse(options: Options, reasons: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the options among `reasons` that are to be left out of the defaults.

    reasons: name of an option -> why it cannot be used
    Raises UnsupportedModeError if the call itself gives one of these options.
    """
    for name, why in reasons.items():
        if options.of_call(name) not in (None, False):
            raise UnsupportedModeError(f"{name}: {why}")
    return tuple(name for name in reasons if name != "assistant_model")


def refuse_options(options: Options) -> None:
    """Raise UnsupportedModeError for options that cannot be combined with pruning.

    It is raised before anything runs. Defaults of the checkpoint that only choose a cache are not
    refused: plphp's cache is used in place of it, see `merged_options`.
    """
    if options.of_call("use_cache") is False:
        raise UnsupportedModeError("use_cache=False leaves no cache to prune: leave the option out")
    kind = options.of_call("cache_implementation")
    if kind not in (None, "dynamic"):
        raise UnsupportedModeError(
            f"cache_implementation={kind!r} asks for another cache: leave the option out, because "
            "an attached model makes a plphp.PrunedCache"
        )
    if options.value("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True is not available: dropped tokens have no attention to return"
        )
    if options.value("token_healing"):
        raise UnsupportedModeError(
            "token_healing=True rewrites the end of the prompt, where the policy scores: leave "
            "the option out, or remove() the pruning"
        )
    for name in CODE_FROM_HUB:
        if options.value(name) not in (None, 0, 1, False):
            raise UnsupportedModeError(
                f"{name} runs code from a hub, which may bypass the cache: leave it out"
            )
    if isinstance(options.kwargs.get("custom_generate"), str):
        raise UnsupportedModeError(
            "custom_generate runs code from a hub, which may bypass the cache: leave it out"
        )
