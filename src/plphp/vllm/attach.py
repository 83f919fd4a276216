"""Hooks on the attention layers of one engine. No class of vLLM is changed.

Changes in vLLM: an Attention's `attn_backend`, so that its metadata leaves out freed blocks, and
its `impl.forward`, because no extension point of vLLM gets the queries.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from plphp.vllm import blocks
from plphp.vllm.checks import check_modes
from plphp.vllm.layout import BACKENDS
from plphp.vllm.options import read_options
from plphp.vllm.worker import WorkerSide

SIDE = "plphp_worker_side"  # the attribute of a layer that holds its `WorkerSide`


def attach(layer: Any, spec: Any, vllm_config: Any) -> Any:
    """Hook one decoder layer, an Attention, and return the spec that assigns its cache group.

    A layer of another kind of attention that may stay beside pruned layers keeps its spec.

    layer: vLLM's Attention
    spec: the KVCacheSpec that vLLM made for it
    Raises UnsupportedModelError for a layer that cannot be pruned and UnsupportedModeError for a
    mode of the engine in which pruning does not work.
    """
    name = layer.layer_name
    options = read_options(vllm_config.kv_transfer_config.kv_connector_extra_config)
    check_modes(vllm_config, options)
    if type(spec) in blocks.LEFT_ALONE:
        return spec
    check_layer(layer, spec, vllm_config.model_config)
    if not issubclass(layer.attn_backend, Shifted):
        layer.attn_backend = shifted_backend(layer.attn_backend)
        layer.impl.forward = observed_forward(name, layer.impl.forward)
    blocks.register()
    group = extract_layer_index(name) // options.layers_per_group
    given = {field.name: getattr(spec, field.name) for field in fields(spec)}
    return blocks.LayerSpec(group=group, **given)


def check_layer(layer: Any, spec: Any, model: Any) -> None:
    """Raise UnsupportedModelError for a layer that cannot be pruned.

    spec: as in `attach`; model: vLLM's ModelConfig
    """
    backend = layer.attn_backend.get_name()
    full = type(spec) is FullAttentionSpec
    reasons = {
        f"its attention backend is {backend}, and plphp supports {', '.join(BACKENDS)}": (
            backend not in BACKENDS
        ),
        blocks.other_cache(spec): not full,
        "its keys and values have unequal head sizes": full and spec.head_size != spec.head_size_v,
        f"its cache is quantized ({spec.dtype})": full and spec.dtype != model.dtype,
        f"image tokens attend to each other in both directions, which {backend} does not compute": (
            model.is_mm_prefix_lm and not layer.attn_backend.supports_mm_prefix()
        ),
        "it has attention sinks": getattr(layer.impl, "sinks", None) is not None,
        "it has position biases (ALiBi)": getattr(layer.impl, "alibi_slopes", None) is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise blocks.refusal(layer.layer_name, reason)


def check_sharing(pruned: Collection[str], modules: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for a layer that attends to the cache of a pruned layer.

    vLLM asks such a layer for no spec, so that `attach` never sees it.

    pruned: names of the layers that are pruned; modules: all attention layers, by name
    """
    for name, module in modules.items():
        target = getattr(module, "kv_sharing_target_layer_name", None)
        if target in pruned:
            raise blocks.refusal(name, f"it shares the cache of {target}")


class Shifted:
    """Base class that marks the backends of `shifted_backend`."""


@functools.cache
def shifted_backend(base: type[Any]) -> type[Any]:
    """A subclass of an attention backend whose metadata leaves out freed blocks."""
    builder: type[Any] = base.get_builder_cls()

    class Builder(builder):
        def build(
            self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
        ) -> Any:
            layers = self.vllm_config.compilation_config.static_forward_context
            name, common = self.layer_names[0], common_attn_metadata
            side = side_of(layers[name])
            if side is not None:
                common = side.shift(side.layers[name].group, common)
            return super().build(common_prefix_len, common, fast_build)

    class Backend(Shifted, base):
        @staticmethod
        def get_builder_cls() -> type[Any]:
            return Builder

    return Backend


def observed_forward(name: str, forward: Any) -> Any:
    """An impl's forward that passes its queries and its output to `WorkerSide.after_attention`."""

    @functools.wraps(forward)
    def observed(
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        result = forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        side = side_of(layer)
        if attn_metadata is not None and side is not None:
            side.after_attention(name, query, output)
        return result

    return observed


def side_of(layer: Any) -> WorkerSide | None:
    """The worker side that a layer belongs to; None before the caches are allocated.

    It is found through the layer, because vLLM hides the connector from batches that it makes up.
    """
    return getattr(layer, SIDE, None)
