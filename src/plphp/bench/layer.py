"""Times of a single layer: its cache and attention in a decoding step, and its pruning."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from plphp.attention import attend, decode_attention, window_probabilities
from plphp.attention.choose import has_kernel
from plphp.bench.caches import Schedule, Setting
from plphp.bench.machine import synchronize
from plphp.cache import KVStore
from plphp.policy import PLPHP, LayerView


def attention_seconds(
    setting: Setting, rate: float, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of one layer's append and attention for a new token: for each round the median.

    "stock" is transformers' DynamicCache and SDPA over all columns, "pruned" is the kept share of
    them, and "short" is transformers' cache of a prompt with as many columns as are kept. Where a
    Triton kernel is available, both kernels are measured, for rows of equal length ("plain") and
    of different lengths ("masked").
    """
    variants: dict[str, Callable[[], Callable[[Tensor, Tensor, Tensor], Any]]] = {
        "stock": lambda: _stock(setting, setting.context),
        "pruned": lambda: _pruned(setting, rate),
        "short": lambda: _stock(setting, setting.kept(rate)),
    }
    if has_kernel(torch.device(setting.device)):
        for masked, kernel in itertools.product((False, True), ("SDPA", "Triton")):
            name = f"{'masked' if masked else 'plain'}, {kernel}"
            variants[name] = partial(_pruned, setting, rate, _KERNELS[kernel], masked)
    found: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, make in variants.items():
                found[name].append(_timed(setting, make(), steps))
    return found


def pruning_seconds(setting: Setting, rate: float, rounds: int) -> list[float]:
    """For each round the seconds of scoring, selection and compaction of one layer of a prompt.

    This is the time that pruning adds to a prefill. It is measured alone, because on a CPU a whole
    prefill takes minutes and varies by more than that.
    """
    seconds, policy = [], PLPHP(r=rate, delta_r=0.0)
    size = (setting.batch, setting.shape.heads, 1, setting.shape.head_dim)
    query = torch.randn(size, dtype=setting.dtype, device=setting.device)
    spans = setting.spans()
    visible = (spans >= 0)[:, None]
    with torch.inference_mode():
        for _ in range(rounds + 1):
            store = KVStore(*setting.pair(setting.context))
            synchronize(setting.device)
            start = time.perf_counter()
            seen = window_probabilities(query, store.keys, visible, query.shape[-1] ** -0.5)
            view = LayerView(seen[:, :, -1], spans, setting.shape.kv_heads)
            store.compact(policy.plan(view))
            synchronize(setting.device)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _timed(setting: Setting, step: Callable[[Tensor, Tensor, Tensor], Any], steps: int) -> float:
    size = (setting.batch, setting.shape.heads, 1, setting.shape.head_dim)
    query = torch.randn(size, dtype=setting.dtype, device=setting.device)
    key, value = setting.pair(1)
    seconds = []
    for _ in range(steps + 2):
        synchronize(setting.device)
        start = time.perf_counter()
        step(query, key, value)
        synchronize(setting.device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def _stock(setting: Setting, columns: int) -> Callable[[Tensor, Tensor, Tensor], Any]:
    cache = DynamicCache()
    cache.update(*setting.pair(columns), 0)
    module = nn.Module()
    module.num_key_value_groups = setting.shape.heads // setting.shape.kv_heads  # type: ignore[assignment]
    module.is_causal = True  # type: ignore[assignment]

    def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
        keys, values = cache.update(key, value, 0)
        return sdpa_attention_forward(module, query, keys, values, None)

    return step


Attention = Callable[[Tensor, KVStore, float], Tensor]


def _triton(query: Tensor, store: KVStore, scale: float) -> Tensor:
    from plphp.attention import flash_decode

    return flash_decode.attend(query, store.keys, store.values, store.start, store.end, scale)


def _sdpa(query: Tensor, store: KVStore, scale: float) -> Tensor:
    return attend(query, *store.held(), store.visible(1), scale)


_KERNELS: dict[str, Attention] = {"SDPA": _sdpa, "Triton": _triton}


def _pruned(
    setting: Setting, rate: float, attention: Attention = decode_attention, masked: bool = False
) -> Callable[[Tensor, Tensor, Tensor], Any]:
    store = KVStore(*setting.pair(setting.context))
    probs = torch.zeros(1, device=setting.device).expand(
        setting.batch, setting.shape.heads, setting.context
    )
    view = LayerView(probs, setting.spans(), setting.shape.kv_heads)
    store.compact(Schedule((rate,)).plan(view))
    store.ragged = masked

    def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
        store.append(key, value)
        out = attention(query, store, query.shape[-1] ** -0.5)
        return out.transpose(1, 2).contiguous()

    return step
