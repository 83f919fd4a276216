"""The models, layers and policies that `plphp.prune` accepts, and why it refuses others."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin

from plphp.errors import InputTypeError, UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.attention import ConfigView
from plphp.hf.sequence import attach_sequence, drop_features
from plphp.hf.tower import attach_tower, tower_method, tower_of
from plphp.hf.vision_mask import Mask
from plphp.models import describes_vision, refusal
from plphp.policy import PLPHP, HiddenPolicy, Policy, in_stages, policy, sequence_stage

# The method of a language model with DeepStack that adds image features to the hidden states.
ADDS_FEATURES = "_deepstack_process"


def chosen_policy(given: Any) -> Policy:
    """The policy that the caller of `plphp.prune` gave, as an object.

    given: a policy, the name or the class of one (with its default options), a list of two stages
        of such, or None for PLPHP()
    Raises InputTypeError for any other type, InputError for stages that do not follow one another,
    and as `policy` does for an unknown name.
    """
    if isinstance(given, list | tuple):
        return in_stages([chosen_policy(stage) for stage in given])
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


def check_kind(model: Any, policy: Policy, modules: list[Any]) -> None:
    """Check that a policy fits the model. Raises as `prune`.

    modules: the attention modules to attach to
    """
    if policy.kind == "images":
        raise UnsupportedModeError(
            f"{type(policy).__name__} makes the images smaller before the model sees them: resize "
            "them to policy.size(width, height, multiple), and do not attach the model"
        )
    first = sequence_stage(policy)
    if first is None:
        return policy.check(len(modules))
    layers = len(decoder_layers(model, modules))
    policy.check(layers)
    if tower_method(policy) is not None:
        tower_of(model)
    others = layers_of_other_kinds(compat.text_config(model))
    if others:
        raise UnsupportedModelError(
            f"{type(first).__name__} drops hidden states, and layers {', '.join(map(str, others))} "
            "of this decoder share their keys and values or hold them in their own way: use a "
            "method that prunes the cache"
        )
    read = [i for i in range(layers) if first.scores_layer(i, layers)]
    if isinstance(first, HiddenPolicy) and first.reads_keys:
        read.append(first.leave_at(layers) - 1)
    if keyless := set(read) - {module.layer_idx for module in modules}:
        raise UnsupportedModelError(
            f"{type(first).__name__} chooses by layer {min(keyless)} of this decoder, which has no "
            "attention that plphp can read: give another layer, as in policy(..., layer=4)"
        )
    text = model.get_decoder()
    adds = [name for name in inspect.signature(text.forward).parameters if "deepstack" in name]
    if adds and not hasattr(text, ADDS_FEATURES):
        raise UnsupportedModelError(
            f"{type(first).__name__} drops hidden states, and {type(text).__name__} adds image "
            "features to those of all tokens: use a method that prunes the cache"
        )


def attach_stages(pruning: Pruning, modules: list[Any]) -> None:
    """Set the hooks that a sequence method needs, if the policy has one.

    modules: the attention modules to attach to
    """
    first = sequence_stage(pruning.policy)
    if first is None:
        return
    text = pruning.model.get_decoder()
    pruning._undo += attach_sequence(pruning, first, decoder_layers(pruning.model, modules))
    in_tower = tower_method(pruning.policy)
    if in_tower is not None:
        attach_tower(pruning, in_tower)
    if hasattr(text, ADDS_FEATURES):
        adds = partial(drop_features, pruning, getattr(text, ADDS_FEATURES))
        pruning._set(text, ADDS_FEATURES, adds)


def layers_of_other_kinds(config: Any) -> list[int]:
    """The layers that hold columns in another way than full or sliding attention does.

    Such a layer cannot be given fewer columns. A recurrent layer, which only holds a state, can.
    """
    windows, layers = compat.layer_windows(config), compat.stock_layers(config)
    holds = [isinstance(layer, CacheLayerMixin) for layer in layers]
    return [i for i, window in enumerate(windows) if isinstance(window, str) and holds[i]]


def decoder_layers(model: nn.Module, modules: list[nn.Module]) -> list[nn.Module]:
    """All layers of the decoder that contains these attention modules, in order."""
    names = {module: name for name, module in model.named_modules()}
    layer = names[modules[0]].rpartition(".")[0]
    return list(model.get_submodule(layer.rpartition(".")[0]).children())


def prunable(model: Any, vision_mask: Mask) -> list[Any]:
    """The attention modules of the layers that can be pruned.

    Raises UnsupportedModelError if the model has none or plphp cannot find its vision tokens, and
    UnsupportedModeError if it is attached already.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        hint = ": pass the model inside it" if hasattr(model, "module") else ""
        if isinstance(getattr(model, "model", None), nn.Module):
            hint = ": pass its `.model`"
        elif isinstance(model, str):
            hint = ": load it first, with AutoModelForImageTextToText.from_pretrained(...)"
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
                "this model is attached already: call remove() on what plphp.prune returned, or "
                "plphp.attached(model).remove()"
            )
        if hasattr(module, "sinks"):
            raise UnsupportedModelError(
                f"{kind} uses attention sinks, so its tokens cannot be scored"
            )
        compat.original_attention(module, module.config)
    return chosen
