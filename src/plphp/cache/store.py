"""Keys and values of one decoder layer, in buffers with slack for the next tokens.

Rows are right-aligned: row b uses the slots [start[b], end), so that all rows end at the same slot.
Then a decode step writes one contiguous slice, and a batch of equally long rows needs no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.policy import KeepPlan

SLACK_DIVISOR, MIN_SLACK = 16, 16  # slack is a 16th of the slots in use, at least 16 slots


class KVStore:
    """Keys (B, Hkv, C, D) and values (B, Hkv, C, Dv), of which the slots [0, end) are in use.

    start: (B,) int64, the first slot of each row; the slots before it are fillers
    ragged: whether any start is above 0; known on the host, since only then a mask is needed
    end: physical length, the number of slots in use, fillers included
    logical: logical length, the number of columns seen; also the column of the next token
    window: size of the sliding window in columns, None for full attention
    columns: (B, Hkv, C) int32, the column in each slot; None without a sliding window
    skips: whether there is a window, and the queries of the forward that runs skip columns

    No gradient passes through the stored tensors.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int | None = None) -> None:
        """Use the keys and values (B, Hkv, N, D) of a prompt as buffers, without a copy."""
        batch, heads, length, _ = keys.shape
        self.keys, self.values = keys.detach(), values.detach()
        self.window = window
        self.start = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        self.columns: Tensor | None = None
        if window is not None:
            columns = torch.arange(length, dtype=torch.int32, device=keys.device)
            self.columns = columns.expand(batch, heads, length).contiguous()
        self.ragged = self.skips = False
        self.end = self.logical = length

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append T columns to every row: keys (B, Hkv, T, D) and values (B, Hkv, T, Dv)."""
        added = keys.shape[2]
        self._grow(self.end + added)
        self.keys[:, :, self.end : self.end + added] = keys.detach()
        self.values[:, :, self.end : self.end + added] = values.detach()
        if self.columns is not None:
            columns = torch.arange(self.logical, self.logical + added, device=keys.device)
            self.columns[:, :, self.end : self.end + added] = columns
        self.end += added
        self.logical += added

    def held(self) -> tuple[Tensor, Tensor]:
        """Views of the slots in use: keys (B, Hkv, end, D), values (B, Hkv, end, Dv)."""
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def compact(self, plan: KeepPlan, reserve: int | None = None) -> None:
        """Copy the slots of a plan into new buffers. The old ones are freed once no view is left.

        plan: its `columns` are slots of this store
        reserve: how many slots of slack to allocate; by default as `slack` says, less on short
            prompts
        """
        longest = plan.columns.shape[-1]
        # On short prompts the default slack may be more than what was dropped. At most half of the
        # dropped slots become slack, so that memory is always freed.
        spare = min(slack(longest), (self.end - longest) // 2) if reserve is None else reserve
        capacity = longest + spare
        self.keys = take(self.keys, plan.columns, capacity)
        self.values = take(self.values, plan.columns, capacity)
        if self.columns is not None:
            self.columns = take(self.columns[..., None], plan.columns, capacity)[..., 0]
        self.start = plan.start
        self.ragged = plan.ragged
        self.end = longest

    def name_columns(self, columns: Tensor, logical: int) -> None:
        """Record which columns the last slots hold, if tokens left the hidden states before.

        columns: (B, K) int64, those of the last K slots; logical: the column after the forward's
            last one
        """
        self.logical = logical
        if self.columns is not None:
            named = columns[:, None].to(self.columns.device, torch.int32)
            self.columns[:, :, self.end - columns.shape[1] : self.end] = named
            self.skips = True

    def close_gaps(self, plan: KeepPlan) -> None:
        """Make the fillers among the last slots those of the row, once no query is at them.

        plan: of the last K slots, for a single KV head
        """
        self.skips, new = False, plan.columns.shape[-1]
        if self.end == new:
            self.start, self.ragged = plan.start.to(self.start.device), plan.ragged
        elif plan.ragged:
            self._close_gaps(plan.start.to(self.start.device), self.end - new)

    def _close_gaps(self, fillers: Tensor, at: int) -> None:
        """Move the slots before the slot `at` right by `fillers` (B,), over fillers that follow."""
        self.start = self.start + fillers
        columns = without_gaps(fillers, at, self.end)[:, None].expand(-1, self.keys.shape[1], -1)
        self.keys, self.values = take(self.keys, columns), take(self.values, columns)
        if self.columns is not None:
            self.columns = take(self.columns[..., None], columns)[..., 0]
        self.ragged = True

    def visible(self, queries: int) -> Tensor | None:
        """The mask of the last `queries` columns, True where one attends to a slot.

        Returns (B or 1, Hkv or 1, queries, end) bool, or None if each attends to every slot.
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
        if self.window is not None and self.logical > self.window and self.columns is not None:
            in_window = self.in_window(self.columns[..., : self.end], queries)
            mask = in_window if mask is None else mask & in_window
        return mask

    def in_window(self, columns: Tensor, queries: int) -> Tensor:
        """Which of some columns (B, Hkv, n) the windows of the last `queries` slots reach back to.

        Returns (B, Hkv, queries, n) bool. Only for a store with a sliding window.
        """
        assert self.columns is not None and self.window is not None
        asking = self.columns[..., self.end - queries : self.end, None]
        return columns[:, :, None] > asking - self.window

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) int64 of the batch, in any order and also repeated, as for beams."""
        rows = rows.to(self.keys.device)
        self.keys, self.values = self.keys[rows], self.values[rows]
        self.start = self.start[rows]
        if self.columns is not None:
            self.columns = self.columns[rows]

    def crop(self, columns: int) -> None:
        """Remove the last `columns` columns, which must be text after the last image."""
        self.end -= columns
        self.logical -= columns

    def split(self, columns: int) -> tuple[Tensor, Tensor]:
        """Remove the last `columns` columns; return their keys (B, Hkv, columns, D) and values."""
        keys, values = (x[:, :, self.end - columns :].clone() for x in self.held())
        self.crop(columns)
        return keys, values

    def to(self, device: torch.device) -> None:
        """Move every buffer to a device."""
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.start = self.start.to(device)
        if self.columns is not None:
            self.columns = self.columns.to(device)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer keeps allocated."""
        tensors = [self.keys, self.values, self.start]
        return tensors if self.columns is None else [*tensors, self.columns]

    def _grow(self, length: int) -> None:
        """Make the buffers large enough for `length` slots."""
        if length <= self.keys.shape[2]:
            return
        capacity = length + slack(length)
        self.keys = _extend(self.keys, self.end, capacity)
        self.values = _extend(self.values, self.end, capacity)
        if self.columns is not None:
            self.columns = _extend(self.columns[..., None], self.end, capacity)[..., 0]


def slack(length: int) -> int:
    """How many slots of slack to allocate with `length` slots in use.

    The slack is proportional to the length, so that the copies of growing buffers cost a constant
    time per token, and at most a 16th of a long buffer is unused.
    """
    return max(MIN_SLACK, length // SLACK_DIVISOR)


def without_gaps(fillers: Tensor, at: int, end: int) -> Tensor:
    """(B, end) int64, the slot from which each slot is filled, so that the gap of a row closes.

    fillers: (B,) int64, how many slots of each row from the slot `at` on hold nothing. The slots
        before them move right, and the fillers are at the row's begin
    """
    slots = torch.arange(end, device=fillers.device)
    moved = torch.where(slots < at + fillers[:, None], slots - fillers[:, None], slots)
    return moved.clamp(min=0)


def take(source: Tensor, columns: Tensor, capacity: int | None = None) -> Tensor:
    """Copy chosen slots of a buffer into a new one.

    source: (B, Hkv, C, D)
    columns: (B, Hkv, K) int64, the slots to copy, other ones in each row and KV head
    capacity: slots of the new buffer, K by default
    Returns (B, Hkv, capacity, D), of which the first K slots are written.
    """
    batch, heads, longest = columns.shape
    capacity = longest if capacity is None else capacity
    target = source.new_empty(batch, heads, capacity, source.shape[-1])
    kept = target[:, :, :longest]
    if source.device.type != "cpu":
        torch.gather(source, 2, columns[..., None].expand_as(kept), out=kept)
        return target
    # On the CPU one index_select for each head is 5 to 10 times faster than a gather, because it
    # copies D numbers at a time.
    for row in range(batch):
        for head in range(heads):
            torch.index_select(source[row, head], 0, columns[row, head], out=kept[row, head])
    return target


def _extend(source: Tensor, used: int, capacity: int) -> Tensor:
    """A larger buffer with the first `used` slots of `source`."""
    target = source.new_empty(*source.shape[:2], capacity, source.shape[-1])
    target[:, :, :used] = source[:, :, :used]
    return target
