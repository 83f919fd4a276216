"""Attach pruning to a model and take it off again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from plphp.cache import Report
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attention import COPIED, SAVED, ConfigView, pass_layer, pruned_attention
from plphp.hf.cache import PrunedCache
from plphp.hf.generate import REFUSED_METHODS, merged_options, own_cache, refuse_method, wrap
from plphp.hf.positions import later_positions, position_shift
from plphp.hf.recall import checked
from plphp.hf.report import build_report
from plphp.hf.sequence import decoder_layers, refuse_turn
from plphp.hf.targets import attach_kind, base_model, chosen_policy, prunable
from plphp.hf.turn import Turn
from plphp.hf.vision_mask import Mask, checked_mask
from plphp.policy import Policy
from plphp.recall import Recall

logger = logging.getLogger("plphp")

MARK = "_plphp"  # attribute of an attached model that holds its Pruning


class Pruning:
    """Pruning attached to one model object; `remove()` or leaving the `with` takes it off.

    Entering a `with` again, after `remove()`, attaches it again.

    report: of the last finished prefill; `cache.report` of a `PrunedCache` is exact where several
        threads generate on one model
    """

    def __init__(
        self, model: Any, policy: Policy, vision_mask: Mask = None, recall: Recall | None = None
    ) -> None:
        self.model = model
        self.policy = policy
        self.recall = recall
        self.vision_mask = vision_mask
        self.report: Report | None = None
        self.layers: tuple[int, ...] = ()  # decoder layers that are attached
        self.over_ranks = compat.over_ranks(model)
        self.decoder: list[nn.Module] = []  # the modules of those layers
        self.calls = (
            threading.local()
        )  # what a generate() that is running in this thread leaves out
        self._entered = False
        self._undo: list[Callable[[], None]] = []
        self._attach()

    def _attach(self) -> None:
        """Hook everything. Raises what `prune` raises, before anything is changed."""
        model = self.model
        modules = prunable(model, self.vision_mask)
        self._undo += attach_kind(model, self.policy, modules)
        compat.register_attention(pruned_attention)
        self.layers = tuple(module.layer_idx for module in modules)
        self.decoder = decoder_layers(model, modules)
        for module in modules:
            self._set(module, "config", ConfigView(module))
            handle = module.register_forward_pre_hook(pass_layer, with_kwargs=True)
            self._undo.append(handle.remove)
        before = model.register_forward_pre_hook(self._begin, with_kwargs=True)
        after = model.register_forward_hook(self._finish, with_kwargs=True, always_call=True)
        self._undo += [before.remove, after.remove]
        if hasattr(model, "generate"):
            self._set(model, "generate", wrap(self, model.generate))
            prepare = model._prepare_generation_config
            self._set(model, "_prepare_generation_config", merged_options(self, prepare))
        for name, why in REFUSED_METHODS.items():
            if hasattr(model, name):
                self._set(model, name, refuse_method(name, why))
        self._set(model, MARK, self)

    def __enter__(self) -> Pruning:
        if self._entered:
            raise UnsupportedModeError("this pruning is in use by an outer `with` already")
        if not self._undo:
            self._attach()
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedModeError(COPIED)

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(SAVED)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute; undone by restoring what the instance itself held."""
        before = vars(owner).get(name)
        had = name in vars(owner)
        setattr(owner, name, value)
        undo = (lambda: setattr(owner, name, before)) if had else (lambda: delattr(owner, name))
        self._undo.append(undo)

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Model pre-hook: every forward gets a pruned cache, and a prompt's last one its spans."""
        cache = self._cache_of(kwargs)
        keyword = compat.cache_keyword(type(model).forward) or compat.CACHE
        kwargs = compat.with_cache(kwargs, keyword, cache)
        source = {**({"input_ids": args[0]} if args else {}), **kwargs}
        given = source.get("input_ids")
        given = source.get("inputs_embeds") if given is None else given
        if given is None:
            raise ValueError("a forward of an attached model needs input_ids or inputs_embeds")
        batch, columns = given.shape[:2]
        if not cache._generating:
            cache.check()
            past = int(cache.get_seq_length())
            if columns > 1 or past == 0:  # a bare forward: what it brings is the prompt
                self.refuse_checkpointing()
                prompt = Turn(columns, source, self.model.config, self.vision_mask)
                cache._open(prompt, self.policy)
            positions = later_positions(model, cache.shift, past, columns, source)
            if positions is not None:
                kwargs["position_ids"] = positions
        turn = cache.shared.turn
        if turn is not None and int(cache.get_seq_length()) + columns >= turn.end:
            turn.locate(batch, kwargs.get("attention_mask"))
            refuse_turn(cache, turn, columns)
        cache._in_forward = True
        return args, kwargs

    def _cache_of(self, kwargs: dict[str, Any]) -> PrunedCache:
        """The cache of a forward, made if there is none. Raises for what pruning cannot serve."""
        cache = compat.given_cache(kwargs)
        if kwargs.get("output_attentions"):
            raise UnsupportedModeError(
                "output_attentions=True is not available: dropped tokens have no attention to "
                "return"
            )
        if kwargs.get("use_cache") is False:
            raise UnsupportedModeError(
                "a forward without a cache cannot be pruned: use_cache=True, or remove()"
            )
        if isinstance(cache, PrunedCache) and cache._generating:
            return cache  # generate() has looked at it, and a compiled step should not again
        if getattr(self.model.config, "output_attentions", False):
            raise UnsupportedModeError(
                "model.config.output_attentions is set, and dropped tokens have no attention to "
                "return: set it to False"
            )
        kwargs["use_cache"] = True  # also where the checkpoint's config says otherwise
        return own_cache(cache, self.model, self.recall)

    def _finish(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Model hook: a prompt that has been read becomes a report. No output: it failed."""
        cache = compat.given_cache(kwargs)
        if not isinstance(cache, PrunedCache):
            return  # refused
        cache._in_forward = False
        turn = cache.shared.turn
        if output is None or turn is None or turn.spans is None:
            return
        drafts = int(cache.get_seq_length()) - turn.end
        cache.shift = position_shift(model, kwargs.get("position_ids"), drafts, turn)
        cache.shared.last_image = max(cache.shared.last_image, turn.last_image)
        report = build_report(cache, turn)
        cache._tell(report)
        if cache._generating or not hasattr(self.calls, "left_out"):
            self.report = report  # else a forward beside a generate(), of its negative prompt
        cache.shared.spans = turn.spans if cache.shared.recall is not None else None
        cache.shared.turn = None
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s", report.summary)

    def refuse_checkpointing(self) -> None:
        """Raise UnsupportedModeError where decoder layers would throw their cache away."""
        if any(m.training and getattr(m, "gradient_checkpointing", False) for m in self.decoder):
            raise UnsupportedModeError(
                "gradient checkpointing in training mode runs the decoder without a cache, so "
                "nothing could be pruned: call model.eval() or "
                "model.gradient_checkpointing_disable() first"
            )


def prune(
    model: Any,
    policy: Policy | type[Policy] | str | None = None,
    *,
    vision_mask: Any = None,
    recall: Recall | str | None = None,
) -> Pruning:
    """Prune the vision tokens of everything that `model` generates until `remove()`.

    model: a transformers vision-language model, or a PEFT or torch.compile wrapper around one
    policy: by default PLPHP(), the paper's; also the name of one, for its defaults
    vision_mask: (B, N) integers coded as `vision_spans` returns them (a tensor, an array or nested
        lists), or a function from input_ids to them, for models whose vision tokens cannot be found
    recall: park what the policy drops and read it again when a later token looks for it, a
        `plphp.Recall` or the name of its home; by default dropped tokens are gone

    Raises UnsupportedModelError, UnsupportedModeError (the model is attached already),
    UnsupportedTransformersError or InputError (a ValueError, and a TypeError for wrong types), with
    what to do, before anything is changed.
    """
    compat.check_version()
    model = base_model(model)
    mask = checked_mask(vision_mask)
    prunable(model, mask)
    recall, chosen = checked(recall, chosen_policy(policy), model)
    return Pruning(model, chosen, mask, recall)


def attached(model: Any) -> Pruning | None:
    """The pruning attached to a model, if any."""
    found: Pruning | None = getattr(base_model(model), "__dict__", {}).get(MARK)
    return found
