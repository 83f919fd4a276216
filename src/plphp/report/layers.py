"""What a prefill kept of each layer, as numbers. No tensor of the cache stays allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.policy import LAYER_CLASSES, KeepPlan


@dataclass(frozen=True, eq=False)
class LayerReport:
    """What a prefill kept of one decoder layer.

    The tuples and `kept` have one entry for each row of the batch. Two reports are equal only if
    they are the same object.

    layer: index of the layer in the decoder, from 0
    gamma: vision attention, 0 to 1 (PLPHP, section 3); NaN where a row has no vision tokens, or
        where its attention is not a number
    layer_class: "vision-attentive", "vision-balanced" or "vision-indifferent"; None where a row has
        no vision tokens or the policy has no layer classes. With recall it decides nothing
    rate: retention rate that the policy asked for, 0 to 1; NaN where a row has no vision tokens, or
        where it depends on a gamma that is NaN
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
    kept: Tensor = field(repr=False)
    vision: tuple[int, ...]
    pruned: bool = True
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @property
    def retention(self) -> float:
        """The share of this layer's vision K/V that was kept, 0 to 1; 1 without vision tokens."""
        return ratio(int((self.kept >= 0).sum()), sum(self.vision) * self.kept.shape[1])


@dataclass(frozen=True)
class StageReport:
    """What one stage of a policy left.

    method: the class of its policy
    layer: the layer before which a sequence method dropped tokens; None for a cache method
    kept: of a sequence method, the share of the prompt's vision tokens that stay from that layer
        on; of a cache method, the share of the K/V of the vision tokens that entered the layers
    stays: of a sequence method, (B, K) int64 on the CPU, row-logical positions of the vision tokens
        that stay, ascending, filled up with -1 on the right; None for a cache method
    """

    method: str
    layer: int | None
    kept: float
    stays: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """The stage without its positions, ready for JSON."""
        return {"method": self.method, "layer": self.layer, "kept": self.kept}

    def __str__(self) -> str:
        if self.layer is None:
            return f"{self.method} kept {self.kept:.1%} of the vision K/V that was computed"
        return (
            f"{self.method} left {self.kept:.1%} of the vision tokens: from layer {self.layer} on, "
            "no layer holds keys of the others"
        )


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

    def vision(self, row: int) -> Tensor:
        """The positions (V,) int64 of the vision tokens of a row, ascending."""
        return self.positions[row][self.spans[row] > 0]


def layer_report(
    layer: int, plan: KeepPlan, spans: Tensor, positions: Tensor, vision: tuple[int, ...]
) -> LayerReport:
    """The report of a layer from its plan.

    spans, positions: (B, C) int64, span and row-logical position of each slot that the plan chose
        from
    vision: (B,) number of vision tokens in the prompt, of which fewer may have entered the layer
    """
    spans, positions, columns = spans.cpu(), positions.cpu(), plan.columns.cpu().long()
    rows = torch.arange(len(spans))[:, None, None]
    shows = plan.valid.cpu()[:, None] & (spans[rows, columns] > 0)
    kept = positions[rows, columns].masked_fill(~shows, -1)
    return LayerReport(
        layer=layer,
        gamma=tuple(plan.gamma.tolist()),
        layer_class=tuple(LAYER_CLASSES[c] if c >= 0 else None for c in plan.classes.tolist()),
        rate=tuple(plan.rate.tolist()),
        kept=left_aligned(kept),
        vision=vision,
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
        kept=left_aligned(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
        pruned=False,
    )


def undefined_note(layers: Sequence[int]) -> list[str]:
    """A note on layers, in order, whose attention is not a number; no note if there are none."""
    if not layers:
        return []
    which = f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(map(str, layers))}"
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        which = f"layers {layers[0]} to {layers[-1]}"
    return [f"the attention of {which} is not a number: the answer cannot be trusted"]


def refuse_undefined(undefined: Sequence[int]) -> None:
    """Raises InputError if there are layers whose attention is not a number, in place of figures.

    undefined: indices of these layers, in order
    """
    for note in undefined_note(undefined):
        raise InputError(f"{note}. Try --dtype float32, or other weights")


def one_class_note(layers: Sequence[LayerReport]) -> list[str]:
    """A note if the pruned layers, two or more, are of one class in all rows; else no note."""
    pruned = [layer for layer in layers if layer.pruned]
    classes = {name for layer in pruned for name in layer.layer_class if name is not None}
    if len(pruned) < 2 or len(classes) != 1:
        return []
    return [
        f"all pruned layers are {classes.pop()}: plphp.calibrate fits alpha and beta to a model; "
        "in the shell --alpha and --beta set them"
    ]


def left_aligned(kept: Tensor) -> Tensor:
    """Positions (B, Hkv, K), ascending, with the -1 on the right and no entry that is -1 in all."""
    order = (kept < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    longest = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
    return kept.gather(-1, order)[..., :longest].clone()


def ratio(part: int, whole: int) -> float:
    """part / whole, and 1 if the whole is 0."""
    return part / whole if whole else 1.0
