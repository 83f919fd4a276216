"""The buffers of one layer with lengths on the device, for compiled decoding.

A decode step reads no length on the host: it works on whole buffers, and tensors say which slots
are in use. So a step that was compiled for one prompt can be replayed for others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.cache.store import KVStore

BUCKET = 64  # capacities are multiples of it, so that prompts of similar length share a graph


class StaticStore:
    """A `KVStore` whose lengths are on the device and whose buffers are never replaced.

    keys, values, start, columns: as in `KVStore`
    end, logical: 0-dim int64 tensors
    ragged: always True, because the host does not know whether rows differ in length

    The caller must not append past the capacity C, which follows from `max_len`.
    """

    ragged = True
    skips = False

    def __init__(self, store: KVStore) -> None:
        """Take over the buffers of a compacted store, and fill their unused slots with zeros."""
        self.keys, self.values, self.window = store.keys, store.values, store.window
        self.start, self.columns = store.start, store.columns
        self.keys[:, :, store.end :] = 0
        self.values[:, :, store.end :] = 0
        device = self.keys.device
        self.end = torch.tensor(store.end, device=device)
        self.logical = torch.tensor(store.logical, device=device)
        for tensor in self.tensors():
            # guard=False: the graph of one prompt is replayed with the buffers of another.
            torch._dynamo.mark_static_address(tensor, guard=False)
            if tensor.dim() > 2:  # the capacity differs between layers and prompts
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def refill(self, store: KVStore) -> bool:
        """Copy a compacted store into these buffers. Returns False if it does not fit into them."""
        pairs = [(self.keys, store.keys), (self.values, store.values)]
        if self.columns is not None and store.columns is not None:
            pairs.append((self.columns, store.columns))
        rows = self.keys.shape[:2] == store.keys.shape[:2]
        if not rows or self.keys.shape[2] < store.keys.shape[2] or self.window != store.window:
            return False
        for target, source in pairs:
            target[:, :, : store.end] = source[:, :, : store.end]
            target[:, :, store.end :] = 0
        self.start.copy_(store.start)
        self.end.fill_(store.end)
        self.logical.fill_(store.logical)
        return True

    def thaw(self) -> KVStore:
        """A `KVStore` over the same buffers, for the prompt of the next turn.

        The host reads the lengths from the device, which waits for it.
        """
        store = KVStore(self.keys, self.values)
        store.window, store.start, store.columns = self.window, self.start, self.columns
        store.end, store.logical = int(self.end), int(self.logical)
        store.ragged = bool((self.start > 0).any())
        return store

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append T columns to every row: keys (B, Hkv, T, D) and values (B, Hkv, T, Dv)."""
        steps = torch.arange(keys.shape[2], device=self.keys.device)
        slots = steps + self.end
        self.keys.index_copy_(2, slots, keys.detach())
        self.values.index_copy_(2, slots, values.detach())
        if self.columns is not None:
            columns = (steps + self.logical).to(self.columns.dtype)
            self.columns.index_copy_(2, slots, columns.expand(*keys.shape[:2], -1))
        self.end.add_(keys.shape[2])
        self.logical.add_(keys.shape[2])

    def held(self) -> tuple[Tensor, Tensor]:
        """The whole buffers: keys (B, Hkv, C, D), values (B, Hkv, C, Dv)."""
        return self.keys, self.values

    def visible(self, queries: int) -> Tensor:
        """(B, Hkv or 1, queries, C) bool: which slots the last `queries` columns attend to."""
        device = self.keys.device
        slots = torch.arange(self.keys.shape[2], device=device)
        steps = torch.arange(queries, device=device) - queries
        mask = (slots <= (self.end + steps)[:, None]) & (slots >= self.start[:, None, None])
        mask = mask[:, None]
        if self.columns is not None and self.window is not None:
            query_columns = (self.logical + steps)[:, None]
            mask = mask & (self.columns[:, :, None] > query_columns - self.window)
        return mask

    def reorder(self, rows: Tensor) -> None:
        """Put the rows in the order (B,) int64, in place. Raises ValueError for another number."""
        rows = rows.to(self.keys.device)
        if len(rows) != len(self.start):
            raise ValueError(f"a static cache keeps its batch of {len(self.start)} rows")
        for tensor in self.tensors():
            if tensor.dim():
                tensor.copy_(tensor[rows])

    def crop(self, columns: int) -> None:
        """Remove the last `columns` columns."""
        self.end.sub_(columns)
        self.logical.sub_(columns)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer keeps allocated."""
        tensors = [self.keys, self.values, self.start, self.end, self.logical]
        return tensors if self.columns is None else [*tensors, self.columns]


def bucketed(length: int) -> int:
    """The capacity of a static buffer that holds `length` slots."""
    return -(-length // BUCKET) * BUCKET
