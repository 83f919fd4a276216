"""Caches of a prompt that nobody read: random keys and values, as many as a prompt leaves.

A decode step costs the same whatever the numbers are, and a CPU reads 32k tokens for an hour.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from plphp.bench.shapes import Shape
from plphp.hf import PrunedCache, prune
from plphp.hf.replan import adopt
from plphp.policy import CachePolicy, LayerView, Look
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

    def pair(self, columns: int) -> tuple[Tensor, Tensor]:
        """Random keys and values (B, Hkv, columns, D) of a layer."""
        size = (self.batch, self.shape.kv_heads, columns, self.shape.head_dim)
        drawn = torch.randn(size, dtype=self.dtype, device=self.device)
        return drawn, drawn.flip(0, 2)


def dynamic(model: Any, setting: Setting, columns: int) -> DynamicCache:
    """transformers' own growing cache after a prompt of so many columns."""
    cache = DynamicCache(config=model.config)
    for layer in range(setting.shape.layers):
        cache.update(*setting.pair(columns), layer)
    return cache


def pruned(model: Any, setting: Setting, policy: CachePolicy) -> PrunedCache:
    """The cache that a policy leaves; the model must be attached."""
    cache = PrunedCache(model)
    spans = setting.spans()
    heads = setting.shape.heads
    probs = torch.zeros(setting.batch, heads, 1, device=setting.device).expand(
        -1, -1, setting.context
    )
    for index, layer in cache.pruned_layers():
        keys, values = setting.pair(setting.context)
        view = LayerView(probs, spans, setting.shape.kv_heads, index, setting.shape.layers)
        adopt(layer, keys, values, policy.plan(view))
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)
    return cache


@dataclass(frozen=True)
class Contender:
    """One way of decoding: what to attach, and how to make its cache."""

    name: str
    attach: Callable[[], AbstractContextManager[Any]]
    make: Callable[[], Any]


def contenders(model: Any, setting: Setting, rates: tuple[float, ...]) -> list[Contender]:
    """The full stock cache, the pruned one, and a stock cache of a prompt as short as that."""
    policy = Schedule(rates)
    kept = round(sum(rates) / len(rates) * (setting.context - TEXT)) + TEXT

    @contextmanager
    def attached() -> Iterator[None]:
        with prune(model, policy, vision_mask=setting.spans()):
            yield

    return [
        Contender("stock", nullcontext, lambda: dynamic(model, setting, setting.context)),
        Contender("pruned", attached, lambda: pruned(model, setting, policy)),
        Contender("stock, short", nullcontext, lambda: dynamic(model, setting, kept)),
    ]
