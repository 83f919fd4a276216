"""The models, layers and policies that `plphp.prune` accepts, and why it refuses others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from plphp.errors import InputTypeError, UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.attention import ConfigView
from plphp.hf.sequence import attach_sequence, decoder_layers
from plphp.hf.vision_mask import Mask
from plphp.models import describes_vision, refusal, sequence_refusal
from plphp.policy import PLPHP, Policy, SequencePolicy, policy


def chosen_policy(given: Any) -> Policy:
    """The policy that the caller of `plphp.prune` gave, as an object.

    given: a policy, the name or the class of one (with its default options), or None for PLPHP()
    Raises InputTypeError for any other type, and as `policy` does for an unknown name.
    """
    if given is None:
        return PLPHP()
    if isinstance(given, str):
        return policy(given)
    if isinstance(given, type) and issubclass(given, Policy):
        given = given()
    if not isinstance(given, Policy):
        raise InputTypeError(
            "policy must be a policy such as plphp.PLPHP(r=0.4), or the name of one such as "
            f"'snapkv', got {given!r}"
        )
    return given


def attach_kind(model: Any, policy: Policy, modules: list[Any]) -> list[Callable[[], None]]:
    """Check that a policy fits the model, and set the hooks that its kind needs.

    modules: the attention modules to attach to
    Returns functions that remove the hooks; only sequence methods have any. Raises as `prune`.
    """
    if policy.kind == "images":
        raise UnsupportedModeError(
            f"{type(policy).__name__} makes the images smaller before the model sees them: resize "
            "them to policy.size(width, height, multiple), and do not attach the model"
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
            "ordinary attention: they need the states of all tokens"
        )
    return attach_sequence(policy, layers)


def prunable(model: Any, vision_mask: Mask) -> list[Any]:
    """The attention modules of the layers that can be pruned.

    Raises UnsupportedModelError if the model has none or plphp cannot find its vision tokens, and
    UnsupportedModeError if it is attached already.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        hint = ": pass the model inside it" if hasattr(model, "module") else ""
        raise UnsupportedModelError(
            f"plphp.prune needs a transformers model, got {type(model).__name__}{hint}"
        )
    kind = getattr(model.config, "model_type", "unknown")
    if reason := refusal(model.config):
        raise UnsupportedModelError(f"{kind}: {reason}")
    if vision_mask is None and not describes_vision(model.config):
        raise UnsupportedModelError(
            f"{kind} names no image or video tokens in its config: if it is a vision-language "
            "model, pass vision_mask=..., coded as plphp.vision_spans returns it"
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
            raise UnsupportedModelError(
                f"{kind} uses attention sinks, so its tokens cannot be scored"
            )
        compat.original_attention(module, module.config)
    return chosen
