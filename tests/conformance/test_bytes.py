"""Invariant 4: bytes reported are bytes allocated, and what is dropped is freed."""

import gc
import types
import weakref
from collections.abc import Iterable, Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers import (
    DynamicCache,
    PreTrainedConfig,
)

import tiny
from invariants import (
    EVERY,
    KV_HEADS,
    attach,
    cache_for,
    generate,
    truth,
)
from plphp.hf.later_turn import History
from versions import CACHE

every_family = pytest.mark.parametrize("name", tiny.CORE)


CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def reachable_tensors(root: object, report: object) -> Iterator[Tensor]:
    """All tensors that an object leads to, except through reports, models, configs and code.

    Token ids of the conversation are left out, as `kv_bytes` says.
    The garbage collector finds them, so that no layout of the cache is assumed.
    """
    outside = (torch.nn.Module, PreTrainedConfig, type(report), History, type, weakref.ref, *CODE)
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or issubclass(type(item), outside):
            continue
        seen.add(id(item))
        if issubclass(type(item), Tensor):
            yield item
        else:
            todo += gc.get_referents(item)


def bytes_of_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> size. Views share a storage, which counts once, with its full size."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("rows", tiny.ROWS)
@pytest.mark.parametrize("name", [*tiny.CORE, *tiny.VARIANTS])
def test_reported_bytes_are_allocated_bytes(name: str, rows: str) -> None:
    expected = truth(name, 0, rows)
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        kv = cache_for(model)
        generate(model, expected.inputs, steps=1, cache=kv)
        tensors = reachable_tensors(kv, kv.report)
        assert kv.report.kv_bytes == sum(bytes_of_storages(tensors).values())
        assert kv.report.kv_bytes < kv.report.kv_bytes_full
    batch, length = expected.spans.shape
    head_dim = tiny.TEXT["hidden_size"] // tiny.TEXT["num_attention_heads"]
    entries = batch * length * tiny.TEXT["num_hidden_layers"] * KV_HEADS * head_dim
    assert kv.report.kv_bytes_full == 2 * 4 * entries, "keys and values in float32"


@every_family
def test_what_is_dropped_is_freed(name: str) -> None:
    """Besides the cache no new tensor exists that could be a layer's keys of the whole prompt."""
    expected = truth(name, 0, "three")
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        generate(model, expected.inputs)
        older = live_tensors()  # kept alive, so that no address is used again
        kv = cache_for(model)
        generate(model, expected.inputs, steps=1, cache=kv)
        own = bytes_of_storages([*older, *reachable_tensors(kv, kv.report)])
        new = bytes_of_storages(live_tensors())
    layer_keys = kv.report.kv_bytes_full / tiny.TEXT["num_hidden_layers"] / 2
    assert [
        size for address, size in new.items() if address not in own and size >= layer_keys
    ] == []


def live_tensors() -> list[Tensor]:
    """Tensors that own memory; those that a compiler left behind own none."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return [tensor for tensor in found if not isinstance(tensor, FakeTensor)]


@every_family
def test_a_report_keeps_no_cache_tensor_alive(name: str) -> None:
    expected = truth(name, 0, "three")
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        kv = cache_for(model)
        generate(model, expected.inputs, cache=kv)
    report = kv.report
    tensors = [weakref.ref(t) for t in reachable_tensors(kv, report) if t.is_floating_point()]
    assert tensors
    del kv
    gc.collect()
    assert [ref().shape for ref in tensors if ref() is not None] == []
    assert str(report)


HYBRID = ["gemma3", "cohere2_vision", "idefics2_window", "qwen3_5", *tiny.DECODERS]


@pytest.mark.parametrize("rows", ["one", "batch"])
@pytest.mark.parametrize("name", [name for name in HYBRID if name in EVERY])
def test_bytes_of_hybrid_models_are_those_of_caches(name: str, rows: str) -> None:
    """Full bytes are those of transformers' own cache; plphp's are those allocated, views included.

    A sliding layer holds its window, though for a moment it is a slice of the whole prompt.
    """
    expected = truth(name, 0, rows)
    model = EVERY[name].build(0)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    with torch.no_grad():
        model(**expected.inputs, **{CACHE: cache}, use_cache=True)
    stock = [t for layer in cache.layers for t in reachable_tensors(layer, None) if t.dim() > 0]
    with attach(model, expected.numbers):
        kv = cache_for(model)
        generate(model, expected.inputs, steps=1, cache=kv)
    assert kv.report.kv_bytes_full == sum(t.numel() * t.element_size() for t in stock)
    tensors = reachable_tensors(kv, kv.report)
    assert kv.report.kv_bytes == sum(bytes_of_storages(tensors).values())
    assert sum(a.kv_bytes_full for a in kv.report.layers) == kv.report.kv_bytes_full
    assert kv.report.kv_bytes < kv.report.kv_bytes_full
