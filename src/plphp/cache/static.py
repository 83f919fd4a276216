"""The buffers of one layer with lengths on the device, so that a decode step is one graph.

Nothing here reads a length on the host: shapes are those of the buffers, what is written is said
by a tensor, and a compiled step is replayed whatever the prompt was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.cache.store import KVStore

BUCKET = 64  # capacities are multiples of it: prompts of about one length share a graph


class StaticStore:
    """A `KVStore` whose `end` and `logical` are 0-dim int64 tensors and whose buffers stay put.

    keys (B, Hkv, C, D), values (B, Hkv, C, Dv), start (B,), positions as in `KVStore`. Appending
    past C is an error of the caller: `max_len` says how much fits.
    ragged: true for all that the host knows
    """

    ragged = True

    def __init__(self, store: KVStore) -> None:
        """Freeze a compacted store: its buffers are adopted, their unwritten slots zeroed."""
        self.keys, self.values, self.window = store.keys, store.values, store.window
        self.start, self.positions = store.start, store.positions
        self.keys[:, :, store.end :] = 0
        self.values[:, :, store.end :] = 0
        device = self.keys.device
        self.end = torch.tensor(store.end, device=device)
        self.logical = torch.tensor(store.logical, device=device)
        for tensor in self.tensors():
            # Without the guard another prompt's buffers replay the same graph.
            torch._dynamo.mark_static_address(tensor, guard=False)
            if tensor.dim() > 2:  # layers keep different lengths, and other prompts others
                torch._dynamo.maybe_mark_dynamic(tensor, 2)

    def refill(self, store: KVStore) -> bool:
        """Take over a compacted store, in these buffers; False where it does not fit them."""
        pairs = [(self.keys, store.keys), (self.values, store.values)]
        if self.positions is not None and store.positions is not None:
            pairs.append((self.positions, store.positions))
        rows = self.keys.shape[:2] == store.keys.shape[:2]
        if not rows or self.keys.shape[2] < store.keys.shape[2] or self.window != store.window:
            return False
        for mine, theirs in pairs:
            mine[:, :, : store.end] = theirs[:, :, : store.end]
            mine[:, :, store.end :] = 0
        self.start.copy_(store.start)
        self.end.fill_(store.end)
        self.logical.fill_(store.logical)
        return True

    def thaw(self) -> KVStore:
        """The same buffers with lengths on the host: two host reads, for the next turn's prompt."""
        store = KVStore(self.keys, self.values)
        store.window, store.start, store.positions = self.window, self.start, self.positions
        store.end, store.logical = int(self.end), int(self.logical)
        store.ragged = bool((self.start > 0).any())
        return store

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add T columns (B, Hkv, T, D) for every row."""
        steps = torch.arange(keys.shape[2], device=self.keys.device)
        slots = steps + self.end
        self.keys.index_copy_(2, slots, keys.detach())
        self.values.index_copy_(2, slots, values.detach())
        if self.positions is not None:
            columns = (steps + self.logical).to(self.positions.dtype)
            self.positions.index_copy_(2, slots, columns.expand(*keys.shape[:2], -1))
        self.end.add_(keys.shape[2])
        self.logical.add_(keys.shape[2])

    def held(self) -> tuple[Tensor, Tensor]:
        """The whole buffers; `visible` says which slots count."""
        return self.keys, self.values

    def visible(self, queries: int) -> Tensor:
        """(B, Hkv or 1, queries, C) bool: which slots the last `queries` columns attend to."""
        device = self.keys.device
        slots = torch.arange(self.keys.shape[2], device=device)
        steps = torch.arange(queries, device=device) - queries
        mask = (slots <= (self.end + steps)[:, None]) & (slots >= self.start[:, None, None])
        mask = mask[:, None]
        if self.positions is not None and self.window is not None:
            ask = (self.logical + steps)[:, None]
            mask = mask & (self.positions[:, :, None] > ask - self.window)
        return mask

    def reorder(self, rows: Tensor) -> None:
        """Rows of the batch in a new order, in place: the batch keeps its size."""
        rows = rows.to(self.keys.device)
        if len(rows) != len(self.start):
            raise ValueError(f"a static cache keeps its batch of {len(self.start)} rows")
        for tensor in self.tensors():
            if tensor.dim():
                tensor.copy_(tensor[rows])

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns."""
        self.end.sub_(columns)
        self.logical.sub_(columns)

    def tensors(self) -> list[Tensor]:
        """Every tensor that the layer keeps allocated."""
        every = [self.keys, self.values, self.start, self.end, self.logical]
        return every if self.positions is None else [*every, self.positions]


def bucketed(length: int) -> int:
    """The capacity of a static buffer that holds `length` slots."""
    return -(-length // BUCKET) * BUCKET
