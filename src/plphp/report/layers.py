"""What a prefill kept of each layer, as numbers. Holds no cache tensor alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plphp.policy import LAYER_CLASSES, KeepPlan


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One decoder layer; every field but `layer` and `pruned` has one entry per batch row.

    layer: its index in the decoder, from 0
    gamma: vision attention, 0 to 1 (PLPHP, section 3), NaN where a row has no vision tokens
    layer_class: "vision-attentive", "vision-balanced", "vision-indifferent", or None
    rate: the retention rate asked for, NaN where a row has no vision tokens
    kept: (B, Hkv, K) int64 on the CPU, row-logical positions of kept vision tokens, -1 pads
    vision: (B,) vision tokens of the prompt
    pruned: False for a layer that was left alone; `Report.notes` says why
    kv_bytes, kv_bytes_full: as in `Report`, of this layer
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
        """Kept vision entries over all vision entries of this layer; 1 without vision tokens."""
        return ratio(int((self.kept >= 0).sum()), sum(self.vision) * self.kept.shape[1])


@dataclass(frozen=True, eq=False)
class Seen:
    """Which tokens of a prompt are vision, for drawing them.

    What only drawing asks for stays on the device where it came.

    spans: (B, N) int64 on the CPU, as `vision_spans` returns them
    positions: (B, N) int64 on the CPU, row-logical position of each column
    config: the model's; inputs: what its processor said of the images, pixels left out
    ids: (B, N) int64, None for a prompt that came as embeddings
    """

    spans: Tensor
    positions: Tensor
    config: Any
    inputs: Mapping[str, Any]
    ids: Tensor | None = None


def layer_report(layer: int, plan: KeepPlan, spans: Tensor, positions: Tensor) -> LayerReport:
    """Read a plan against the slots (B, C) that it chose from: their spans and positions."""
    spans, positions, columns = spans.cpu(), positions.cpu(), plan.columns.cpu()
    used = torch.arange(columns.shape[-1]) >= columns.shape[-1] - plan.lengths.cpu()[:, None]
    rows = torch.arange(len(spans))[:, None, None]
    vision = used[:, None] & (spans[rows, columns] > 0)
    kept = positions[rows, columns].masked_fill(~vision, -1)
    return LayerReport(
        layer=layer,
        gamma=tuple(plan.gamma.tolist()),
        layer_class=tuple(LAYER_CLASSES[c] if c >= 0 else None for c in plan.classes.tolist()),
        rate=tuple(plan.rate.tolist()),
        kept=_close_ranks(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
    )


def untouched_report(layer: int, spans: Tensor, positions: Tensor, kv_heads: int) -> LayerReport:
    """A layer that was left alone, or a prompt without images: every vision token is kept."""
    spans, positions = spans.cpu(), positions.cpu()
    nothing = (float("nan"),) * len(spans)
    kept = positions.masked_fill(spans <= 0, -1)[:, None].expand(-1, kv_heads, -1)
    return LayerReport(
        layer=layer,
        gamma=nothing,
        layer_class=(None,) * len(spans),
        rate=nothing,
        kept=_close_ranks(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
        pruned=False,
    )


def _close_ranks(kept: Tensor) -> Tensor:
    """Move -1 to the right, positions still ascending, and cut what is -1 for every head."""
    order = (kept < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    most = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
    return kept.gather(-1, order)[..., :most].clone()


def ratio(part: int, whole: int) -> float:
    """part / whole; 1 where the whole is nothing."""
    return part / whole if whole else 1.0
