"""The input of a policy, `LayerView`, and its output, `KeepPlan`."""

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
    layer: index of this layer, from 0
    layers: number of layers of the decoder
    over_ranks: function that averages a tensor over tensor-parallel ranks, each of which holds a
        part of the heads; without tensor parallelism it returns the tensor itself
    window: (B, H, W, N) float32, attention of the last W prompt tokens, the last token last. W is
        at most the policy's `window`. A row with fewer tokens than W has zeros in their place
    asked: (B, W) int64, the columns of those W tokens, -1 where a row has none
    keys, values: (B, Hkv, N, D) and (B, Hkv, N, Dv), the keys and values of the layer, or None. A
        policy must not store them: pruning frees their memory
    images: the largest number of images in a row, None where it is not known
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
        """The largest number of images in a row. The host waits for it if `images` is None."""
        return max(int(self.spans.max()), 0) if self.images is None else self.images


@dataclass(frozen=True)
class KeepPlan:
    """The columns of one layer that every row and KV head keeps, text included.

    columns: (B, Hkv, K) int64, ascending and right-aligned: row b uses the last `lengths[b]`
        entries. The entries before them are fillers, which attention must mask out
    lengths: (B,) int64, number of columns that each row keeps, the same for all its KV heads; K is
        the largest of them
    gamma: (B,) float32, vision attention; NaN where a row has no vision tokens
    rate: (B,) float64, retention rate that the policy asked for; NaN where a row has no vision
        tokens
    classes: (B,) int64, index into LAYER_CLASSES; -1 where a row has no vision tokens or the
        policy has no layer classes
    ragged: whether rows differ in length, so that there are fillers
    """

    columns: Tensor
    lengths: Tensor
    gamma: Tensor
    rate: Tensor
    classes: Tensor
    ragged: bool

    @property
    def start(self) -> Tensor:
        """(B,) int64, the number of fillers before the kept columns of each row."""
        return self.columns.shape[-1] - self.lengths

    @property
    def valid(self) -> Tensor:
        """(B, K) bool, False for fillers."""
        entries = torch.arange(self.columns.shape[-1], device=self.lengths.device)
        return entries >= self.start[:, None]


LAYER_CLASSES = ("vision-indifferent", "vision-balanced", "vision-attentive")


def pack(
    keep: Tensor,
    gamma: Tensor,
    rate: Tensor,
    classes: Tensor,
    extent: tuple[int, int] | None = None,
) -> KeepPlan:
    """Make a plan from a keep mask (B, Hkv, N) bool, with the same count in all heads of a row.

    gamma, rate, classes: (B,) each, copied into the plan, see `KeepPlan`
    extent: the number of kept columns of the shortest and of the longest row. Without it the host
        reads them from the device, once
    """
    lengths = keep[:, 0].sum(-1)
    shortest, longest = extent or torch.stack(lengths.aminmax()).tolist()
    # A stable sort of the mask moves the kept columns to the end and leaves them ascending. Every
    # row then ends at the same slot, so that later tokens are appended at one slot for all rows.
    order = keep.to(torch.uint8).argsort(dim=-1, stable=True)
    columns = order[..., keep.shape[-1] - longest :].clone()  # a view would hold all of them
    return KeepPlan(columns, lengths, gamma, rate, classes, shortest < longest)


def keep_in_every_head(keep: Tensor, kv_heads: int, least: int = 0) -> KeepPlan:
    """A plan that keeps these columns (B, N) bool in every KV head, without further numbers.

    least: K is at least this number; fillers make up for it
    """
    nothing = torch.full(keep.shape[:1], torch.nan, device=keep.device)
    every = keep[:, None].expand(-1, kv_heads, -1)
    shortest, longest = torch.stack(keep.sum(-1).aminmax()).tolist()
    extent = shortest, max(longest, least)
    return pack(every, nothing, nothing.double(), torch.full_like(nothing, -1).long(), extent)
