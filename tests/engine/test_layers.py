"""Layers are unchanged without PLPHPConnector; with it, unsupported layers are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
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
from plphp.vllm import attach


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
        ("", "kv_sharing_target_layer_name", "layers.0", "it shares its cache with another layer"),
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
    monkeypatch.setattr(getattr(layer, owner) if owner else layer, name, value, raising=False)
    with pytest.raises(plphp.UnsupportedModelError, match=f"cannot be pruned in vLLM: {message}"):
        layer.get_kv_cache_spec(config)


@pytest.mark.parametrize("kind", [SlidingWindowSpec, ChunkedLocalAttentionSpec, MLAAttentionSpec])
def test_caches_of_other_kinds_are_refused(kind: Any, stock: Any) -> None:
    config, layer = stock
    own = vars(layer.get_kv_cache_spec(config)) | {"sliding_window": 64, "attention_chunk_size": 8}
    spec = kind(**{field.name: own[field.name] for field in fields(kind) if field.name in own})
    with pytest.raises(plphp.UnsupportedModelError, match=f"cache is of kind {kind.__name__}"):
        attach.check_layer(layer, spec, torch.float32)
