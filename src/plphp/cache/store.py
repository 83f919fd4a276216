"""Keys and values of one decoder layer, in buffers with room to append.

Rows are right-aligned: row b owns slots [start[b], end) of the buffers, so that every row ends at
the same slot, a decode step writes one contiguous slice, and a batch of equal rows needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.policy import KeepPlan

SLACK_SHARE, SLACK_LEAST = 16, 16  # room to append: a 16th of what is held, at least 16 slots


class KVStore:
    """Keys (B, Hkv, C, D) and values (B, Hkv, C, Dv), of which slots [0, end) are written.

    start: (B,) int64 first slot of each row; slots before it hold nothing and must be hidden
    ragged: whether any start is above 0, known on the host so that equal rows cost no mask
    logical: columns seen so far, dropped ones and padding included; the next token's column
    positions: (B, Hkv, C) int32 column of each slot, kept only where a sliding window needs it

    What is stored carries no gradient.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None = None) -> None:
        """Adopt a prompt's (B, Hkv, N, D) as it is: `compact` copies what is kept, once."""
        batch, heads, length, _ = keys.shape
        self.keys, self.values = keys.detach(), values.detach()
        self.window = window
        self.start = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        self.positions: Tensor | None = None
        if window is not None:
            columns = torch.arange(length, dtype=torch.int32, device=keys.device)
            self.positions = columns.expand(batch, heads, length).contiguous()
        self.ragged = False
        self.end = self.logical = length

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add T columns (B, Hkv, T, D) for every row."""
        added = keys.shape[2]
        self._grow(self.end + added)
        self.keys[:, :, self.end : self.end + added] = keys.detach()
        self.values[:, :, self.end : self.end + added] = values.detach()
        if self.positions is not None:
            columns = torch.arange(self.logical, self.logical + added, device=keys.device)
            self.positions[:, :, self.end : self.end + added] = columns
        self.end += added
        self.logical += added

    def held(self) -> tuple[Tensor, Tensor]:
        """Views of the written slots: keys (B, Hkv, end, D), values (B, Hkv, end, Dv)."""
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def compact(self, plan: KeepPlan, reserve: int | None = None) -> None:
        """Keep only the plan's slots, in fresh buffers; the old ones are freed with their views."""
        longest = plan.columns.shape[-1]
        # On short prompts slack would outweigh what was dropped: half of it is freed for sure.
        spare = min(slack(longest), (self.end - longest) // 2) if reserve is None else reserve
        capacity = longest + spare
        self.keys = take(self.keys, plan.columns, capacity)
        self.values = take(self.values, plan.columns, capacity)
        if self.positions is not None:
            self.positions = take(self.positions[..., None], plan.columns, capacity)[..., 0]
        self.start = plan.start
        self.ragged = plan.ragged
        self.end = longest

    def name_columns(self, plan: KeepPlan, logical: int) -> None:
        """Say which columns the held slots are: tokens left before this layer, as planned.

        plan: columns (B, 1 or Hkv, end) of the `logical` columns that the model was given
        """
        self.start = plan.start
        self.ragged = plan.ragged
        self.logical = logical
        if self.positions is not None:
            self.positions = plan.columns.to(torch.int32).expand_as(self.positions).contiguous()

    def visible(self, queries: int) -> Tensor | None:
        """Which slots the last `queries` columns attend to, True for yes.

        (B or 1, Hkv or 1, queries, end) bool, or None where every query sees every slot.
        """
        device = self.start.device
        slots = torch.arange(self.end, device=device)
        mask: Tensor | None = None
        if self.ragged:
            mask = (slots >= self.start[:, None])[:, None, None]
        if queries > 1:
            last = torch.arange(self.end - queries, self.end, device=device)
            causal = (slots <= last[:, None])[None, None]
            mask = causal if mask is None else mask & causal
        if self.window is not None and self.logical > self.window and self.positions is not None:
            ask = torch.arange(self.logical - queries, self.logical, device=device)[:, None]
            near = self.positions[:, :, None, : self.end] > ask - self.window
            mask = near if mask is None else mask & near
        return mask

    def reorder(self, rows: Tensor) -> None:
        """Rows (B',) of the batch, in a new order or repeated: beams, batch selection."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.start = self.start[rows]
        if self.positions is not None:
            self.positions = self.positions[rows]

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns, all of them text after the last image."""
        self.end -= columns
        self.logical -= columns

    def split(self, columns: int) -> tuple[Tensor, Tensor]:
        """Take the last `columns` columns out: keys (B, Hkv, columns, D), values."""
        keys, values = (held[:, :, self.end - columns :].clone() for held in self.held())
        self.crop(columns)
        return keys, values

    def to(self, device: torch.device) -> None:
        """Move every buffer to a device."""
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.start = self.start.to(device)
        if self.positions is not None:
            self.positions = self.positions.to(device)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer keeps allocated."""
        every = [self.keys, self.values, self.start]
        return every if self.positions is None else [*every, self.positions]

    def _grow(self, need: int) -> None:
        if need <= self.keys.shape[2]:
            return
        capacity = need + slack(need)
        self.keys = _extend(self.keys, self.end, capacity)
        self.values = _extend(self.values, self.end, capacity)
        if self.positions is not None:
            self.positions = _extend(self.positions[..., None], self.end, capacity)[..., 0]


def slack(length: int) -> int:
    """Free slots that go with `length` used ones: growth is amortised, the waste is bounded."""
    return max(SLACK_LEAST, length // SLACK_SHARE)


def take(source: Tensor, columns: Tensor, capacity: int | None = None) -> Tensor:
    """(B, Hkv, C, D) at columns (B, Hkv, K) -> a buffer (B, Hkv, capacity, D), K slots written.

    capacity: K by default
    """
    batch, heads, longest = columns.shape
    capacity = longest if capacity is None else capacity
    target = source.new_empty(batch, heads, capacity, source.shape[-1])
    kept = target[:, :, :longest]
    if source.device.type != "cpu":
        torch.gather(source, 2, columns[..., None].expand_as(kept), out=kept)
        return target
    # On the CPU one index_select a head moves whole rows of D, 5 to 10 times faster than a gather.
    for row in range(batch):
        for head in range(heads):
            torch.index_select(source[row, head], 0, columns[row, head], out=kept[row, head])
    return target


def _extend(source: Tensor, used: int, capacity: int) -> Tensor:
    target = source.new_empty(*source.shape[:2], capacity, source.shape[-1])
    target[:, :, :used] = source[:, :, :used]
    return target
