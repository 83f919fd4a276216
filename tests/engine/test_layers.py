"""Layers are unchanged without PLPHPConnector; with it, unsupported layers are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import serving
import torch
from vllm.config import KVTransferConfig
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

import plphp
from plphp.vllm import attach, blocks
from plphp.vllm.checks import check_groups
from plphp.vllm.options import Options


@pytest.fixture(scope="module")
def stock() -> Iterator[tuple[Any, Any]]:
    """The config of an engine that does not prune, and its first decoder layer."""
    with serving.engine(stock=True, async_scheduling=False) as llm:
        config = llm.llm_engine.vllm_config
        yield config, next(iter(config.compilation_config.static_forward_context.values()))


def test_without_the_switch_nothing_is_changed(stock: Any) -> None:
    config, layer = stock
    assert type(layer.get_kv_cache_spec(config)) is FullAttentionSpec
    assert layer.attn_backend is CPUAttentionBackend
    assert "forward" not in vars(layer.impl)


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        (
            "attn_backend",
            "get_name",
            staticmethod(lambda: "FLEX_ATTENTION"),
            "its attention backend is",
        ),
        ("impl", "sinks", torch.zeros(8), "it has attention sinks"),
        ("impl", "alibi_slopes", [0.5], r"it has position biases \(ALiBi\)"),
    ],
)
def test_layers_that_cannot_be_pruned_are_refused(
    stock: Any, owner: str, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layer = stock
    transfer = KVTransferConfig(**plphp.vllm.engine_args()["kv_transfer_config"])
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    monkeypatch.setattr(getattr(layer, owner), name, value, raising=False)
    with pytest.raises(plphp.UnsupportedModelError, match=f"cannot be pruned in vLLM: {message}"):
        layer.get_kv_cache_spec(config)


def test_a_layer_that_reads_the_cache_of_a_pruned_layer_is_refused() -> None:
    modules = {
        "layers.2": SimpleNamespace(kv_sharing_target_layer_name=None),
        "layers.3": SimpleNamespace(kv_sharing_target_layer_name="layers.2"),
    }
    attach.check_sharing({"layers.1"}, modules)
    message = "layers.3 cannot be pruned in vLLM: it shares the cache of layers.2"
    with pytest.raises(plphp.UnsupportedModelError, match=message):
        attach.check_sharing({"layers.1", "layers.2"}, modules)


def spec_of(kind: Any, stock: Any) -> Any:
    """A spec of another kind with the sizes of the first layer."""
    config, layer = stock
    own = vars(layer.get_kv_cache_spec(config)) | {"sliding_window": 64, "attention_chunk_size": 8}
    return kind(**{field.name: own[field.name] for field in fields(kind) if field.name in own})


def test_caches_of_other_kinds_are_refused(stock: Any) -> None:
    config, layer = stock
    spec = spec_of(MLAAttentionSpec, stock)
    with pytest.raises(plphp.UnsupportedModelError, match="cache is of kind MLAAttentionSpec"):
        attach.check_layer(layer, spec, config.model_config)


def test_layers_with_a_window_are_left_alone_beside_others(stock: Any) -> None:
    """Cache groups of windows stay, but at least one group has to have full attention."""
    config, layer = stock
    full = blocks.LayerSpec(group=0, **vars(layer.get_kv_cache_spec(config)))
    windows = [spec_of(kind, stock) for kind in (SlidingWindowSpec, ChunkedLocalAttentionSpec)]
    groups = [SimpleNamespace(kv_cache_spec=one, layer_names=["x"]) for one in (*windows, full)]
    assert blocks.prunable(groups) == groups[2:]
    large = SimpleNamespace(kv_cache_spec=replace(full, block_size=64), layer_names=["x"])
    with pytest.raises(plphp.UnsupportedModelError, match="layers have blocks of 32 and 64 tokens"):
        blocks.prunable([*groups, large])
    with pytest.raises(plphp.UnsupportedModelError, match="no layer of the model has full"):
        blocks.prunable(groups[:2])
    other = SimpleNamespace(kv_cache_spec=spec_of(MLAAttentionSpec, stock), layer_names=["x"])
    with pytest.raises(plphp.UnsupportedModelError, match="cache is of kind MLAAttentionSpec"):
        blocks.prunable([*groups, other])


def test_layers_share_no_table_beside_layers_that_are_left_alone() -> None:
    check_groups(3, 3, Options(layers_per_group=2))
    check_groups(3, 5, Options())
    with pytest.raises(plphp.UnsupportedModeError, match="use layers_per_group=1"):
        check_groups(3, 5, Options(layers_per_group=2))


def test_attention_in_both_directions_needs_a_backend_for_it(
    stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layer = stock
    spec = layer.get_kv_cache_spec(config)
    model = SimpleNamespace(dtype=spec.dtype, is_mm_prefix_lm=True)
    message = "image tokens attend to each other in both directions, which CPU_ATTN does not"
    with pytest.raises(plphp.UnsupportedModelError, match=message):
        attach.check_layer(layer, spec, model)
    monkeypatch.setattr(layer.attn_backend, "supports_mm_prefix", classmethod(lambda cls: True))
    attach.check_layer(layer, spec, model)
