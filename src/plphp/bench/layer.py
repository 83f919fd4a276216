"""The share of a step that pruning is about: one layer's cache and attention, nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from plphp.attention import decode_attention, window_probabilities
from plphp.bench.caches import Schedule, Setting
from plphp.bench.machine import synchronize
from plphp.cache import KVStore
from plphp.policy import PLPHP, LayerView


def attention_seconds(
    setting: Setting, rate: float, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of a layer's append and attention for one new token, a median each round.

    "stock": transformers' DynamicCache and sdpa over all columns; "pruned": what a layer keeps at
    this rate; "short": transformers' own over a prompt as short as that
    """
    ways: dict[str, Callable[[], Callable[[Tensor, Tensor, Tensor], Any]]] = {
        "stock": lambda: _stock(setting, setting.context),
        "pruned": lambda: _pruned(setting, rate),
        "short": lambda: _stock(setting, setting.kept(rate)),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, make in ways.items():
                found[name].append(_timed(setting, make(), steps))
    return found


def pruning_seconds(setting: Setting, rate: float, rounds: int) -> list[float]:
    """Seconds of scoring, choosing and compacting one layer of a prompt, one a round.

    What pruning adds to a prefill; beside minutes of prompt on a CPU it drowns in their noise.
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


def _pruned(setting: Setting, rate: float) -> Callable[[Tensor, Tensor, Tensor], Any]:
    store = KVStore(*setting.pair(setting.context))
    probs = torch.zeros(1, device=setting.device).expand(
        setting.batch, setting.shape.heads, setting.context
    )
    view = LayerView(probs, setting.spans(), setting.shape.kv_heads)
    store.compact(Schedule((rate,)).plan(view))

    def step(query: Tensor, key: Tensor, value: Tensor) -> Any:
        store.append(key, value)
        out = decode_attention(query, store, query.shape[-1] ** -0.5)
        return out.transpose(1, 2).contiguous()

    return step
