"""Caches of a prompt that nobody read: random keys and values, as many as a prompt leaves.

A decode step costs the same whatever the numbers are, and a CPU reads 32k tokens for an hour.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

from plphp.bench.shapes import Shape
from plphp.cache import bucketed
from plphp.errors import InputError
from plphp.hf import PrunedCache, compat
from plphp.hf.shared_prefill import adopt
from plphp.policy import CachePolicy, LayerView, Look, plan_views
from plphp.policy.base import flat_look

TEXT = 32  # columns of text around the images


@dataclass(frozen=True)
class Schedule(CachePolicy):
    """Keeps a forced share in every layer: random weights have no attention to go by.

    rates: a share a layer, repeated over the layers
    """

    rates: tuple[float, ...]

    def look(self, view: LayerView) -> Look:
        """Every token is worth a different number; which one does not matter."""
        scores = torch.arange(view.spans.shape[1], device=view.spans.device).float()
        scores = (scores * 0.6180339887) % 1
        shape = (len(view.spans), view.kv_heads, view.spans.shape[1])
        return flat_look(view, scores.expand(shape), self.rates[view.layer % len(self.rates)])


@dataclass(frozen=True)
class Setting:
    """context: columns of the prompt; images: how many share all of them but `TEXT`"""

    shape: Shape
    context: int
    batch: int
    images: int
    dtype: torch.dtype
    device: str

    def spans(self) -> Tensor:
        """(B, context) int64, coded as `plphp.vision_spans` does it."""
        vision = max(self.context - TEXT, 0)
        columns = torch.arange(self.context, device=self.device) - TEXT // 2
        number = columns * self.images // max(vision, 1) + 1
        inside = (columns >= 0) & (columns < vision)
        return torch.where(inside, number, 0).expand(self.batch, -1).contiguous()

    def kept(self, rate: float) -> int:
        """Columns that are left of the prompt where this share of its vision tokens is kept."""
        return round(rate * (self.context - TEXT)) + TEXT

    def pair(self, columns: int) -> tuple[Tensor, Tensor]:
        """Random keys and values (B, Hkv, columns, D) of a layer."""
        size = (self.batch, self.shape.kv_heads, columns, self.shape.head_dim)
        drawn = torch.randn(size, dtype=self.dtype, device=self.device)
        return drawn, drawn.flip(0, 2)


def view(setting: Setting, layer: int, window: int = 1) -> LayerView:
    """A layer after a prompt, as a policy sees it, with attention that means nothing."""
    size = (setting.batch, setting.shape.heads, window, setting.context)
    seen = torch.rand(size, device=setting.device)
    seen /= seen.sum(-1, keepdim=True)
    asked = torch.arange(setting.context - window, setting.context, device=setting.device)
    keys, values = setting.pair(setting.context)
    return LayerView(
        seen[:, :, -1],
        setting.spans(),
        setting.shape.kv_heads,
        layer,
        setting.shape.layers,
        window=seen,
        asked=asked.expand(setting.batch, -1),
        keys=keys,
        values=values,
    )


def dynamic(model: Any, setting: Setting, columns: int) -> DynamicCache:
    """transformers' own growing cache after a prompt of so many columns."""
    return _filled(DynamicCache(config=compat.text_config(model)), setting, columns)


def quantized(model: Any, setting: Setting, kind: str) -> QuantizedCache:
    """transformers' own quantized cache, "int4" or "fp8", after the whole prompt."""
    how: dict[str, Any] = {"backend": "fp8"} if kind == "fp8" else {"backend": "quanto", "nbits": 4}
    return _filled(
        QuantizedCache(config=compat.text_config(model), **how), setting, setting.context
    )


def static(model: Any, setting: Setting, room: int) -> Callable[[], StaticCache]:
    """transformers' static cache, its buffers filled again for every turn."""
    size = bucketed(setting.context + room)
    cache = StaticCache(config=compat.text_config(model), max_cache_len=size)

    def make() -> StaticCache:
        cache.reset()
        return _filled(cache, setting, setting.context)

    return make


def pruned(
    model: Any, setting: Setting, policy: CachePolicy, cache: PrunedCache | None = None
) -> PrunedCache:
    """The cache that a policy leaves; the model must be attached."""
    cache = PrunedCache(model) if cache is None else cache
    indices = [index for index, _ in cache.pruned_layers()]
    if len(indices) < setting.shape.layers:
        raise InputError("this model has layers that pruning leaves alone; bench has no row for it")
    together = policy.kind == "layers"
    for some in [indices] if together else [[index] for index in indices]:
        views = {index: view(setting, index, policy.window) for index in some}
        for index, plan in plan_views(policy, views).items():
            seen = views.pop(index)
            assert seen.keys is not None and seen.values is not None
            adopt(cache.layers[index], seen.keys, seen.values, plan)
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)
    return cache


def pruned_static(
    model: Any, setting: Setting, policy: CachePolicy, room: int
) -> Callable[[], PrunedCache]:
    """A static pruned cache, its buffers filled again for every turn."""
    held: list[PrunedCache] = []

    def make() -> PrunedCache:
        if not held:
            held.append(PrunedCache(model, max_len=setting.context + room, static=True))
        held[0].reset()
        held[0].generating = True  # what follows are steps: nothing is to be read on the host
        return pruned(model, setting, policy, held[0])

    return make


def _filled(cache: Any, setting: Setting, columns: int) -> Any:
    for layer in range(setting.shape.layers):
        cache.update(*setting.pair(columns), layer)
    return cache
