"""What a prefill kept of each layer, as numbers. No tensor of the cache stays allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.policy import LAYER_CLASSES, KeepPlan


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What a prefill kept of one decoder layer.

    The tuples and `kept` have one entry for each row of the batch. Two reports are equal only if
    they are the same object.

    layer: index of the layer in the decoder, from 0
    gamma: vision attention, 0 to 1 (PLPHP, section 3); NaN where a row has no vision tokens
    layer_class: "vision-attentive", "vision-balanced" or "vision-indifferent"; None where a row has
        no vision tokens or the policy has no layer classes
    rate: retention rate that the policy asked for, 0 to 1; NaN where a row has no vision tokens
    kept: (B, Hkv, K) int64 on the CPU, row-logical positions of the kept vision tokens, ascending,
        filled up with -1 on the right
    vision: number of vision tokens in the prompt
    pruned: False for a layer that was left alone; `Report.notes` says why
    kv_bytes, kv_bytes_full: as in `Report`, for this layer
    """

    layer: int
    gamma: tuple[float, ...]
    layer_class: tuple[str | None, ...]
    rate: tuple[float, ...]
    kept: Tensor
    vision: tuple[int, ...]
    pruned: bool = True
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @property
    def retention(self) -> float:
        """The share of this layer's vision K/V that was kept, 0 to 1; 1 without vision tokens."""
        return ratio(int((self.kept >= 0).sum()), sum(self.vision) * self.kept.shape[1])


@dataclass(frozen=True, eq=False)
class Seen:
    """Which tokens of a prompt are vision tokens, and what the inspector needs to draw them.

    `inputs` and `ids` are the caller's own tensors, on their device: copies would cost time in
    every prefill, and only the inspector reads them.

    spans: (B, N) int64 on the CPU, as `vision_spans` returns them
    positions: (B, N) int64 on the CPU, row-logical position of each column
    config: configuration of the model
    inputs: the processor's description of the images, such as grids, without pixels
    ids: (B, N) int64, None for a prompt that was given as embeddings
    """

    spans: Tensor
    positions: Tensor
    config: Any
    inputs: Mapping[str, Any]
    ids: Tensor | None = None


def layer_report(layer: int, plan: KeepPlan, spans: Tensor, positions: Tensor) -> LayerReport:
    """The report of a layer from its plan.

    spans, positions: (B, C) int64, span and row-logical position of each slot that the plan chose
        from
    """
    spans, positions, columns = spans.cpu(), positions.cpu(), plan.columns.cpu()
    rows = torch.arange(len(spans))[:, None, None]
    vision = plan.valid.cpu()[:, None] & (spans[rows, columns] > 0)
    kept = positions[rows, columns].masked_fill(~vision, -1)
    return LayerReport(
        layer=layer,
        gamma=tuple(plan.gamma.tolist()),
        layer_class=tuple(LAYER_CLASSES[c] if c >= 0 else None for c in plan.classes.tolist()),
        rate=tuple(plan.rate.tolist()),
        kept=_left_aligned(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
    )


def untouched_report(layer: int, spans: Tensor, positions: Tensor, kv_heads: int) -> LayerReport:
    """The report of a layer where nothing was dropped, with every vision token kept.

    Such a layer was left alone, or the prompt has no images.

    spans, positions: (B, N) int64, span and row-logical position of each column
    """
    spans, positions = spans.cpu(), positions.cpu()
    no_number = (float("nan"),) * len(spans)
    kept = positions.masked_fill(spans <= 0, -1)[:, None].expand(-1, kv_heads, -1)
    return LayerReport(
        layer=layer,
        gamma=no_number,
        layer_class=(None,) * len(spans),
        rate=no_number,
        kept=_left_aligned(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
        pruned=False,
    )


def _left_aligned(kept: Tensor) -> Tensor:
    """Positions (B, Hkv, K), ascending, with the -1 on the right and no entry that is -1 in all."""
    order = (kept < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    longest = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
    return kept.gather(-1, order)[..., :longest].clone()


def ratio(part: int, whole: int) -> float:
    """part / whole, and 1 if the whole is 0."""
    return part / whole if whole else 1.0
