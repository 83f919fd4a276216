"""Caches with random keys and values, as if a model had read a prompt.

The time of a decoding step does not depend on the numbers, and a CPU needs an hour to read a prompt
of 32k tokens.
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

TEXT = 32  # columns of text: half of them before the images, half after


@dataclass(frozen=True)
class Schedule(CachePolicy):
    """A policy that keeps a given share in every layer, whatever the attention is.

    Models with random weights have no meaningful attention.

    rates: the share of each layer; a shorter tuple is repeated over the layers
    """

    rates: tuple[float, ...]

    def look(self, view: LayerView) -> Look:
        """Scores that differ between all tokens and have no other meaning."""
        scores = torch.arange(view.spans.shape[1], device=view.spans.device).float()
        scores = (scores * 0.6180339887) % 1
        shape = (len(view.spans), view.kv_heads, view.spans.shape[1])
        return flat_look(view, scores.expand(shape), self.rates[view.layer % len(self.rates)])


@dataclass(frozen=True)
class Setting:
    """The prompt and the model of one benchmark.

    context: columns of the prompt, of which `TEXT` are text
    batch: rows
    images: images, to which all other columns belong in equal parts
    rounded: with rounded weights, the bytes of those that a decoding step reads, and of all
    """

    shape: Shape
    context: int
    batch: int
    images: int
    dtype: torch.dtype
    device: str
    rounded: tuple[int, int] | None = None

    @property
    def weights_read(self) -> int:
        """Bytes of the weights that a decoding step reads."""
        return self.rounded[0] if self.rounded else self.shape.parameters * self.dtype.itemsize

    @property
    def weights(self) -> int:
        """Bytes of all weights, the table of input embeddings included."""
        if self.rounded:
            return self.rounded[1]
        table = self.shape.vocabulary * self.shape.hidden
        return (self.shape.parameters + table) * self.dtype.itemsize

    def spans(self) -> Tensor:
        """Spans (B, context) int64 in the coding of `plphp.vision_spans`."""
        vision = max(self.context - TEXT, 0)
        columns = torch.arange(self.context, device=self.device) - TEXT // 2
        number = columns * self.images // max(vision, 1) + 1
        inside = (columns >= 0) & (columns < vision)
        return torch.where(inside, number, 0).expand(self.batch, -1).contiguous()

    def kept(self, rate: float) -> int:
        """Columns of the prompt that remain if this share of its vision tokens is kept."""
        return round(rate * (self.context - TEXT)) + TEXT

    def pair(self, columns: int) -> tuple[Tensor, Tensor]:
        """Random keys and values of a layer, each (B, Hkv, columns, D)."""
        size = (self.batch, self.shape.kv_heads, columns, self.shape.head_dim)
        drawn = torch.randn(size, dtype=self.dtype, device=self.device)
        return drawn, drawn.flip(0, 2)


def view(setting: Setting, layer: int, window: int = 1) -> LayerView:
    """A policy's view of a layer after a prompt, with random attention.

    window: queries at the end of the prompt whose attention the policy uses
    """
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
    """transformers' DynamicCache after a prompt of this many columns."""
    return _filled(DynamicCache(config=compat.text_config(model)), setting, columns)


def quantized(model: Any, setting: Setting, kind: str) -> QuantizedCache:
    """transformers' QuantizedCache after the whole prompt. kind: "int4" or "fp8"."""
    how: dict[str, Any] = {"backend": "fp8"} if kind == "fp8" else {"backend": "quanto", "nbits": 4}
    return _filled(
        QuantizedCache(config=compat.text_config(model), **how), setting, setting.context
    )


def static(model: Any, setting: Setting, answer_columns: int) -> Callable[[], StaticCache]:
    """A function that fills one StaticCache of transformers anew at each call.

    answer_columns: columns that an answer may take
    """
    size = bucketed(setting.context + answer_columns)
    cache = StaticCache(config=compat.text_config(model), max_cache_len=size)

    def make() -> StaticCache:
        cache.reset()
        return _filled(cache, setting, setting.context)

    return make


def pruned(
    model: Any, setting: Setting, policy: CachePolicy, cache: PrunedCache | None = None
) -> PrunedCache:
    """The cache of a prompt that the policy has pruned. The model must be attached."""
    cache = PrunedCache(model) if cache is None else cache
    indices = [index for index, _ in cache.pruned_layers()]
    if len(indices) < setting.shape.layers:
        raise InputError("this model has layers that pruning leaves alone; bench has no row for it")
    together = policy.kind == "layers"
    for some in [indices] if together else [[index] for index in indices]:
        fill(cache, setting, policy, some)
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)
    return cache


def fill(cache: PrunedCache, setting: Setting, policy: CachePolicy, indices: list[int]) -> None:
    """Fill layers that the policy prunes together. Afterwards none of them is there in full."""
    views = {index: view(setting, index, policy.window) for index in indices}
    for index, plan in plan_views(policy, views).items():
        seen = views.pop(index)
        assert seen.keys is not None and seen.values is not None
        adopt(cache.layers[index], seen.keys, seen.values, plan, seen.spans)


def pruned_static(
    model: Any, setting: Setting, policy: CachePolicy, answer_columns: int
) -> Callable[[], PrunedCache]:
    """A function that fills one static PrunedCache anew at each call.

    answer_columns: columns that an answer may take
    """
    held: list[PrunedCache] = []

    def make() -> PrunedCache:
        if not held:
            held.append(PrunedCache(model, max_len=setting.context + answer_columns, static=True))
        held[0].reset()
        return pruned(model, setting, policy, held[0])

    return make


def _filled(cache: Any, setting: Setting, columns: int) -> Any:
    for layer in range(setting.shape.layers):
        cache.update(*setting.pair(columns), layer)
    return cache
