"""What a policy sees of a layer, and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, PADDING = 0, -1  # codes of a span tensor; i > 0 is the i-th image or video of the row


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class LayerView:
    """One decoder layer at the end of a prompt of N columns (padding included).

    probs: (B, H, N) float32, post-softmax attention of each row's last prompt token
    spans: (B, N) int64, 0 text, i > 0 the i-th image or video, -1 padding (never attended)
    kv_heads: Hkv, a divisor of H; query head h reads KV head h // (H / Hkv)
    layer, layers: index of this layer, from 0, and how many the decoder has
    over_ranks: mean of a tensor over tensor-parallel ranks, which each see a share of the heads;
        the tensor itself without them
    window: (B, H, W, N) float32, the same attention of the last W prompt tokens, the last one
        last; W is at most the policy's own `window`, and rows of zeros stand for tokens that a
        prompt does not have
    asked: (B, W) int64, the columns of those W tokens, -1 where there is none
    keys, values: (B, Hkv, N, D) and (B, Hkv, N, Dv) that the layer holds, or None; a policy that
        keeps them keeps the memory that it was asked to free
    images: how many images a row has at most, None where nobody has counted
    """

    probs: Tensor
    spans: Tensor
    kv_heads: int
    layer: int = 0
    layers: int = 1
    over_ranks: Callable[[Tensor], Tensor] = _same
    window: Tensor | None = None
    asked: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    images: int | None = None

    def most_images(self) -> int:
        """How many images a row has at most; a host read where nobody has counted."""
        return max(int(self.spans.max()), 0) if self.images is None else self.images


@dataclass(frozen=True)
class KeepPlan:
    """The columns that every row and KV head keeps, text included.

    columns: (B, Hkv, K) int64, ascending and right-aligned: row b uses the last `lengths[b]`
        entries, the entries before them are fillers that must be hidden
    lengths: (B,) int64, kept columns of each row, one count for all its heads; K is their maximum
    gamma: (B,) float32, vision attention; NaN where a row has no vision tokens
    rate: (B,) float64, retention rate that was asked for; NaN where a row has no vision tokens
    classes: (B,) int64, index into LAYER_CLASSES; -1 where there is none
    ragged: whether rows differ in length, so that fillers exist
    """

    columns: Tensor
    lengths: Tensor
    gamma: Tensor
    rate: Tensor
    classes: Tensor
    ragged: bool

    @property
    def start(self) -> Tensor:
        """(B,) int64, how many fillers precede the kept columns of each row."""
        return self.columns.shape[-1] - self.lengths

    @property
    def valid(self) -> Tensor:
        """(B, K) bool, False for the fillers of shorter rows."""
        places = torch.arange(self.columns.shape[-1], device=self.lengths.device)
        return places >= self.start[:, None]


LAYER_CLASSES = ("vision-indifferent", "vision-balanced", "vision-attentive")


def pack(keep: Tensor, gamma: Tensor, rate: Tensor, classes: Tensor) -> KeepPlan:
    """Turn a keep mask (B, Hkv, N) bool with equal counts over heads into a plan.

    gamma, rate, classes: (B,) each, handed on as they are, see `KeepPlan`. One host read: K, and
    whether all rows keep as many.
    """
    lengths = keep[:, 0].sum(-1)
    shortest, longest = torch.stack(lengths.aminmax()).tolist()
    # A stable sort of the mask moves the kept columns to the end and leaves them ascending, so
    # that every row ends at the same slot and later tokens append at one place for all rows.
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)
    columns = order[..., keep.shape[-1] - longest :]
    return KeepPlan(columns, lengths, gamma, rate, classes, shortest < longest)
