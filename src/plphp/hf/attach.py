"""Attach pruning to a model and take it off again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.attached import MARK, Pruning, base_model
from plphp.hf.attention import ConfigView, pass_layer, pruned_attention
from plphp.hf.cache import PrunedCache, own_cache
from plphp.hf.generate import UNSUPPORTED_METHODS, refuse_method, wrap
from plphp.hf.positions import later_positions, position_shift
from plphp.hf.prompt import Mask
from plphp.hf.recall import checked
from plphp.hf.report import build_report
from plphp.hf.sequence import attach_sequence, decoder_layers, refuse_prompt
from plphp.models import describes_vision, refusal, sequence_refusal
from plphp.policy import PLPHP, Policy, SequencePolicy
from plphp.recall import Recall

logger = logging.getLogger("plphp")


def prune(
    model: Any,
    policy: Policy | None = None,
    *,
    vision_mask: Mask = None,
    recall: Recall | str | None = None,
) -> Pruning:
    """Prune the vision tokens of everything that `model` generates until `remove()`.

    model: a transformers vision-language model, or a PEFT wrapper around one
    policy: by default PLPHP(), the paper's
    vision_mask: (B, N) int64 coded as `vision_spans` returns it, or a function from input_ids to
        it, for models whose vision tokens cannot be found
    recall: park what the policy drops and read it again when a later token looks for it, a
        `plphp.Recall` or the name of its home; by default dropped tokens are gone

    Raises UnsupportedModelError, UnsupportedModeError (the model is attached already) or
    UnsupportedTransformersError, with what to do, before anything is changed.
    """
    compat.check_version()
    model = base_model(model)
    modules = _prunable(model, vision_mask)
    recall, policy = checked(recall, PLPHP() if policy is None else policy, model)
    undo = _attach_kind(model, policy, modules)
    pruning = Pruning(model, policy, vision_mask, recall)
    compat.register_attention(pruned_attention)
    pruning._undo += undo
    pruning.layers = tuple(module.layer_idx for module in modules)
    for module in modules:
        pruning._set(module, "config", ConfigView(module))
        handle = module.register_forward_pre_hook(pass_layer, with_kwargs=True)
        pruning._undo.append(handle.remove)
    before = model.register_forward_pre_hook(_begin(pruning), with_kwargs=True)
    after = model.register_forward_hook(_finish(pruning), with_kwargs=True)
    pruning._undo += [before.remove, after.remove]
    if hasattr(model, "generate"):
        pruning._set(model, "generate", wrap(pruning, model.generate))
    for name in UNSUPPORTED_METHODS:
        if hasattr(model, name):
            pruning._set(model, name, refuse_method(name))
    pruning._set(model, MARK, pruning)
    return pruning


def _attach_kind(model: Any, policy: Policy, modules: list[Any]) -> list[Callable[[], None]]:
    """Hooks of a method that works on hidden states, none for others. Raises what `prune` does."""
    if policy.kind == "images":
        raise UnsupportedModeError(
            f"{type(policy).__name__} makes pictures smaller, before the model: resize them to "
            "policy.size(width, height, multiple) and leave the model as it is"
        )
    policy.check(len(modules))
    if not isinstance(policy, SequencePolicy):
        return []
    if reason := sequence_refusal(model.config):
        raise UnsupportedModelError(f"{model.config.model_type}: {reason}")
    layers = decoder_layers(model, modules)
    if len(layers) < len(compat.layer_windows(compat.text_config(model))):
        raise UnsupportedModelError(
            f"{type(policy).__name__} drops hidden states, and some layers of this decoder have no "
            "ordinary attention: what they need would be missing"
        )
    return attach_sequence(policy, layers)


def _prunable(model: Any, vision_mask: Mask) -> list[Any]:
    """The attention modules to attach to, or the reason why there are none."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UnsupportedModelError(
            f"plphp.prune needs a transformers model, got {type(model).__name__}"
        )
    kind = getattr(model.config, "model_type", "unknown")
    if reason := refusal(model.config):
        raise UnsupportedModelError(f"{kind}: {reason}")
    if vision_mask is None and not describes_vision(model.config):
        raise UnsupportedModelError(
            f"{kind} names no image or video tokens in its config: either it is not a "
            "vision-language model, or pass vision_mask=..., coded as plphp.vision_spans returns it"
        )
    config = compat.text_config(model)
    windows = compat.layer_windows(config)
    modules = compat.attention_modules(model, config)
    ordinary = {i for i, window in enumerate(windows) if not isinstance(window, str)}
    chosen = [module for i, module in sorted(modules.items()) if i in ordinary]
    if not chosen:
        compat.check_seam()
        raise UnsupportedModelError(
            f"{kind} has no decoder layer that can be pruned: none with ordinary self-attention "
            "calls transformers' attention interface"
        )
    for module in chosen:
        if isinstance(module.config, ConfigView):
            raise UnsupportedModeError(
                "this model is attached already: remove() that pruning first"
            )
        if hasattr(module, "sinks"):
            raise UnsupportedModelError(f"{kind} uses attention sinks; it cannot be scored")
        compat.original_attention(module, module.config)
    return chosen


Hook = Callable[..., Any]


def _begin(pruning: Pruning) -> Hook:
    """Model pre-hook: every forward gets a pruned cache, and a prompt's last one its spans."""
    keyword = compat.cache_keyword(type(pruning.model).forward) or compat.CACHE

    def begin(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = _cache_of(model, kwargs)
        kwargs = compat.with_cache(kwargs, keyword, cache)
        source = {**({"input_ids": args[0]} if args else {}), **kwargs}
        given = source.get("input_ids")
        given = source.get("inputs_embeds") if given is None else given
        if given is None:
            raise ValueError("a forward of an attached model needs input_ids or inputs_embeds")
        batch, columns = given.shape[:2]
        if not cache.generating:
            cache.check()
            past = int(cache.get_seq_length())
            if columns > 1 or past == 0:  # a bare forward: what it brings is the prompt
                cache.begin(columns, source, pruning)
            positions = later_positions(model, cache.shift, past, columns, source)
            if positions is not None:
                kwargs["position_ids"] = positions
        prefill = cache.shared.prefill
        if prefill is not None and int(cache.get_seq_length()) + columns >= prefill.prompt.end:
            prefill.locate(batch, kwargs.get("attention_mask"))
            refuse_prompt(cache, prefill, columns)
        return args, kwargs

    return begin


def _cache_of(model: nn.Module, kwargs: dict[str, Any]) -> PrunedCache:
    """The cache of a forward, made if there is none. Raises for what pruning cannot serve."""
    if kwargs.get("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True is not available: dropped tokens have no attention to return"
        )
    cache = compat.given_cache(kwargs)
    wanted = kwargs.get("use_cache")
    if wanted is None and cache is None:
        wanted = getattr(compat.text_config(model), "use_cache", True)
    if wanted is False:
        raise UnsupportedModeError(
            "a forward without a cache cannot be pruned: use_cache=True, or remove()"
        )
    if cache is None:
        kwargs["use_cache"] = True
    if isinstance(cache, PrunedCache) and cache.generating:
        return cache  # generate() has looked at it, and a compiled step should not again
    return own_cache(cache, model)


def _finish(pruning: Pruning) -> Hook:
    """Model hook: a prompt that has been read becomes a report."""

    def finish(
        model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        cache = compat.given_cache(kwargs)
        prefill = cache.shared.prefill
        if prefill is None or prefill.located is None:
            return
        drafts = int(cache.get_seq_length()) - prefill.prompt.end
        cache.shift = position_shift(model, kwargs.get("position_ids"), drafts, prefill.located)
        pruning.report = report = build_report(cache, prefill)
        cache.finish(report)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", report.summary)

    return finish
