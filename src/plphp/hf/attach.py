"""`plphp.prune`: attaches pruning to a model, and the hooks that run in its forwards."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from plphp._installed import warn_if_untested
from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat, stock
from plphp.hf.attached import MARK, Pruning, base_model
from plphp.hf.attention import ConfigView, pass_layer, pruned_attention
from plphp.hf.cache import PrunedCache
from plphp.hf.generate import (
    REFUSED_METHODS,
    merged_options,
    own_cache,
    refuse_checkpointing,
    refuse_method,
    wrap,
)
from plphp.hf.plan_ahead import PREFILL, plan_ahead, read_twice
from plphp.hf.positions import later_positions, position_shift
from plphp.hf.recall import checked_bits, checked_recall
from plphp.hf.report import build_report
from plphp.hf.sequence import refuse_prompt
from plphp.hf.targets import attach_stages, check_kind, chosen_policy, decoder_layers, prunable
from plphp.hf.token_types import missing_types
from plphp.hf.vision_mask import checked_mask
from plphp.policy import Policy, sequence_stage
from plphp.recall import Recall

logger = logging.getLogger("plphp")


def prune(
    model: Any,
    policy: Policy | type[Policy] | str | Sequence[Any] | None = None,
    *,
    vision_mask: Any = None,
    recall: Recall | str | None = None,
    kv_bits: int | None = None,
    kv_text: bool = False,
) -> Pruning:
    """Attach a pruning to a model: every prompt that it reads is pruned until `remove()`.

    model: a transformers vision-language model, or a PEFT or torch.compile wrapper around one
    policy: what to keep: a policy, a policy class or the name of a policy, the last two with their
        default options. By default PLPHP() with the options of the paper. A list of a sequence
        method and a cache method makes two stages: the second prunes what the first has left
    vision_mask: which tokens are vision tokens, for models where plphp cannot find them: (B, N)
        integers coded as `vision_spans` returns them (a tensor, an array or nested lists), or a
        function from input_ids (B, N) to such a tensor
    recall: a `plphp.Recall`, or the name of its home with default options: vision tokens that the
        policy drops are parked, and read again when a later token attends to them. By default
        dropped tokens are lost
    kv_bits: 4 or 2: the vision tokens that the policy keeps are stored in codes of so many bits a
        number. By default they are stored in full, in the model's dtype
    kv_text: with kv_bits, text is stored in codes too, but for the last 32 text tokens of a prompt
        and the tokens of the answer

    Raises UnsupportedModelError, UnsupportedModeError (such as for a model that is attached
    already), UnsupportedTransformersError, InputError (a ValueError) or InputTypeError (also a
    TypeError). The message says what to do, and the model has not been changed. Warns once, with a
    UserWarning, of a torch or a transformers that is outside the tested versions.
    """
    compat.check_version()
    warn_if_untested()
    model = base_model(model)
    mask = checked_mask(vision_mask)
    prunable(model, mask)
    recall, chosen = checked_recall(recall, chosen_policy(policy), model)
    return Pruning(model, chosen, mask, recall, checked_bits(kv_bits, kv_text, recall), _attach)


def _attach(pruning: Pruning) -> None:
    """Set all hooks and attributes. Raises as `prune` does, before anything is changed."""
    model = pruning.model
    modules = prunable(model, pruning.vision_mask)
    check_kind(model, pruning.policy, modules)
    compat.register_attention(pruned_attention)
    pruning.layers = tuple(module.layer_idx for module in modules)
    pruning.decoder = decoder_layers(model, modules)
    attach_stages(pruning, modules)
    for module in modules:
        pruning._set(module, "config", ConfigView(module))
        handle = module.register_forward_pre_hook(pass_layer, with_kwargs=True)
        pruning._undo.append(handle.remove)
    # Partials, not closures: pickling or copying the model then reaches `pruning`, which raises
    # an error that says what to do.
    # The keyword is looked up here, because reading a signature takes longer than a hook should.
    keyword = compat.cache_keyword(type(model).forward) or compat.CACHE
    begin, finish = partial(_begin, pruning, keyword), partial(_finish, pruning)
    before = model.register_forward_pre_hook(begin, with_kwargs=True)
    after = model.register_forward_hook(finish, with_kwargs=True, always_call=True)
    pruning._undo += [before.remove, after.remove]
    if vars(model).get("_compiled_call_impl") is not None:
        # model.compile() has compiled a call without these hooks, and torch would go on using it.
        pruning._set(model, "_compiled_call_impl", None)
    if hasattr(model, "generate"):
        pruning._set(model, "generate", wrap(pruning, model.generate))
        prepare = model._prepare_generation_config
        pruning._set(model, "_prepare_generation_config", merged_options(pruning, prepare))
        if sequence_stage(pruning.policy) is not None and hasattr(model, PREFILL):
            twice = read_twice(pruning.policy, len(pruning.decoder))
            pruning._set(model, PREFILL, plan_ahead(getattr(model, PREFILL), twice))
    for name, why in REFUSED_METHODS.items():
        if hasattr(model, name):
            pruning._set(model, name, refuse_method(name, why))
    pruning._set(model, MARK, pruning)


def _begin(
    pruning: Pruning,
    keyword: str,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the model: give it a pruned cache, and begin a prompt where one begins.

    The images are located in the forward that brings the prompt's last column.

    keyword: the name under which the model's forward takes its cache
    """
    cache = _cache_of(pruning, kwargs)
    kwargs = compat.with_cache(kwargs, keyword, cache)
    source = {**({"input_ids": args[0]} if args else {}), **kwargs}
    given = source.get("input_ids")
    given = source.get("inputs_embeds") if given is None else given
    if given is None:
        raise InputError("a forward of an attached model needs input_ids or inputs_embeds")
    batch, columns = given.shape[:2]
    if not cache._generating:
        past = cache.get_seq_length()
        if not (cache.frozen and columns == 1 and torch.compiler.is_compiling()):
            cache.check()
            past = int(past)
            if columns > 1 or past == 0:  # a forward outside generate(): its input is a prompt
                refuse_checkpointing(pruning)
                pruning.calls.condensed, pruning.calls.noted = False, []
                found = missing_types(model, source, past, columns)
                kwargs, source = {**kwargs, **found}, {**source, **found}
                cache._begin(columns, source, pruning)
        # A compiled step reads no length: with the number in it, every step would be a graph.
        positions = later_positions(model, cache.shift, past, columns, source)
        if positions is not None:
            kwargs["position_ids"] = positions
    prefill = cache.shared.prefill
    if prefill is not None:
        prefill.begin_forward(int(cache.get_seq_length()), columns)
        if prefill.reads_last:
            prefill.locate(batch, kwargs.get("attention_mask"))
            refuse_prompt(cache, prefill)
    cache._in_forward = True
    pruning.calls.remaining = None
    return args, kwargs


def _cache_of(pruning: Pruning, kwargs: dict[str, Any]) -> PrunedCache:
    """The cache of a forward; a new one if the call has none.

    Raises UnsupportedModeError for options and caches that pruning cannot be combined with.
    """
    cache = compat.given_cache(kwargs)
    if kwargs.get("output_attentions"):
        raise UnsupportedModeError(
            "output_attentions=True is not available: dropped tokens have no attention to return"
        )
    if kwargs.get("use_cache") is False:
        raise UnsupportedModeError(
            "a forward without a cache cannot be pruned: pass use_cache=True"
        )
    if isinstance(cache, PrunedCache) and cache._generating:
        return cache  # generate() has checked it; a compiled step must not check again
    if getattr(pruning.model.config, "output_attentions", False):
        raise UnsupportedModeError(
            "model.config.output_attentions is set, and dropped tokens have no attention to "
            "return: set it to False"
        )
    kwargs["use_cache"] = True  # also where the config of the checkpoint says otherwise
    return own_cache(kwargs, pruning)


def _finish(
    pruning: Pruning, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Forward hook of the model: make the report once a prompt has been read.

    output: None where the forward raised an exception
    """
    cache = compat.given_cache(kwargs)
    if not isinstance(cache, PrunedCache):
        return  # `_begin` has refused the call
    cache._in_forward, pruning.calls.remaining = False, None
    prefill = cache.shared.prefill
    if output is None or prefill is None or prefill.plans_now or not prefill.reads_last:
        return
    assert prefill.located is not None
    drafts = int(cache.get_seq_length()) - prefill.prompt.end
    cache.shift = position_shift(model, kwargs.get("position_ids"), drafts, prefill.located)
    stock.release_views(cache.layers)
    report = build_report(cache, prefill)
    cache._finish(report)
    if cache._generating or not hasattr(pruning.calls, "left_out"):
        # Otherwise it is a forward that generate() adds for a negative prompt, with its own cache.
        pruning.report = report
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s", report.summary)
