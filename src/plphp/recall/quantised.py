"""Parked on the device in few bits: what is not kept in full is demoted, and all of it is read.

Nothing is chosen while an answer is written. Blocks of codes are made numbers again where attention
reads them, keys first and then values, so that a whole layer is never dense at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plphp.attention import coded_attention, side_by_side
from plphp.cache import KVStore, take
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable, plan_within
from plphp.recall.codes import code_bytes, keys_to_codes, values_to_codes
from plphp.recall.options import RANGE_BYTES, Recall
from plphp.recall.slots import at_hand, first_slots, vision_first


class QuantisedHome:
    """The vision tokens of one layer that are not kept in full: P of a row's V in a KV head.

    keys, values: their codes, rows of fewer tokens end in fillers
    valid: (B, P) bool, which are no fillers; None where all count
    columns: (B, Hkv, P) int32, a token's column, for sliding windows only
    plan: as in `HostHome`
    held: (B, Hkv, k) int64 in main memory, which token of its row each of the first k slots holds
    count: (B,) int64 in main memory, vision tokens of each row
    full, resident, device: as in `HostHome`
    """

    def __init__(self, store: KVStore, look: Look, recall: Recall, place: Place) -> None:
        """Park the vision tokens of a store that holds the whole prompt.

        look: whom the policy would keep in full
        """
        assert recall.bits is not None
        keys, values = store.held()
        vision = look.spans > 0
        tokens = vision.sum(-1)
        unit = sum(x.shape[-1] * x.element_size() for x in (keys, values))
        dims = (keys.shape[-1], values.shape[-1])
        filled = 2 * dims[0]  # bytes that the last tokens' rows may be filled up with
        small = code_bytes(tokens, dims, recall.bits) + filled
        each = unit - sum(dims) * recall.bits / 8 - RANGE_BYTES
        most = affordable(recall.budget, tokens, unit, each, small, least=0, place=place)
        plan = plan_within(look, most)
        ordered = vision_first(plan, look.spans)
        self.plan: KeepPlan | None = ordered
        self.held = at_hand(ordered, look.spans, most).cpu()
        order, valid = left_over(plan, vision)
        self.valid = None if bool(valid.all()) else valid
        self.columns = order.int() if store.window is not None else None
        self.keys = keys_to_codes(take(keys, order), recall.bits)
        self.values = values_to_codes(take(values, order), recall.bits)
        self.token_bytes = unit
        heads = keys.shape[1]
        self.resident, self.full = (int(x.sum()) * heads * unit for x in (most, tokens))
        parked = code_bytes(tokens - most, dims, recall.bits)
        self.device = self.resident + int(parked.sum()) * heads
        self.count, self.tokens_a_row = tokens.cpu(), int(tokens.max())
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns over what is held and parked."""
        return coded_attention(query, store, self, scale, softcap)

    def visible(self, store: KVStore, queries: int) -> Tensor | None:
        """(B or 1, Hkv or 1, T, end + P) bool, None where every query sees everything."""
        own = store.visible(queries)
        if own is None and self.valid is None and self.columns is None:
            return None
        length = self.keys.tokens
        device = store.start.device
        parked = torch.ones(1, 1, queries, length, dtype=torch.bool, device=device)
        if self.valid is not None:
            parked = parked & self.valid[:, None, None]
        if self.columns is not None and store.window is not None:
            asking = torch.arange(store.logical - queries, store.logical, device=device)[:, None]
            parked = parked & (self.columns[:, :, None] > asking - store.window)
        if own is None:
            own = torch.ones(1, 1, queries, store.end, dtype=torch.bool, device=device)
        return side_by_side(own, parked)

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """As in `HostHome`: what is held, and then what is parked, as numbers again."""
        keys, parked = store.held()[0], self.keys.dense().to(store.keys.dtype)
        real = torch.ones(parked.shape[:3], dtype=torch.bool, device=parked.device)
        if self.valid is not None:
            real = real & self.valid[:, None]
        vision = torch.cat([self.vision_slots(store), real], 2)
        return torch.cat([keys, parked], 2), self.visible(store, queries), vision

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which of a store's slots hold vision tokens."""
        return first_slots(self.held.to(store.start.device), self.tokens_a_row, store)

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens of all rows and heads, D) of every vision token, in order."""
        batch, heads = self.held.shape[:2]
        most = self.tokens_a_row
        parked = torch.ones(batch, heads, most + 1, dtype=torch.bool)
        parked.scatter_(2, self.held, False)
        real = torch.arange(most) < self.count[:, None]
        parked = (parked[..., :most] & real[:, None]).to(store.start.device)
        resident = (real[:, None].to(parked.device)) & ~parked
        # What is held in full lies in the store in the order of the tokens, as parked ones do.
        here = self.vision_slots(store)
        whole = []
        coded_ones = self.values.packed[..., 0] >= 0
        if self.valid is not None:
            coded_ones = coded_ones & self.valid[:, None]
        numbers = self.keys.dense(), self.values.dense()
        for held, coded in zip(store.held(), numbers, strict=True):
            full = held.new_zeros(*parked.shape, held.shape[-1])
            full[resident] = held[here]
            full[parked] = coded[coded_ones].to(full.dtype)
            whole.append(full[real[:, None].expand(-1, heads, -1).to(parked.device)])
        return whole[0], whole[1]

    def tensors(self) -> list[Tensor]:
        """What lies on the device besides the layer's own buffers."""
        return self.parked() + [x for x in (self.valid, self.columns) if x is not None]

    def parked(self) -> list[Tensor]:
        """The codes, on the device."""
        return [self.keys.packed, self.values.packed]

    def crop(self, store: KVStore, columns: int) -> None:
        """A store has forgotten its last columns: nothing was chosen for them."""

    def reorder(self, rows: Tensor) -> None:
        """Rows (B',) of the batch."""
        self.held, self.count = (x[rows.cpu()] for x in (self.held, self.count))
        self._through(lambda x: x[rows.to(x.device)])

    def move(self, device: torch.device) -> None:
        self._through(lambda x: x.to(device))

    def _through(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = self.keys.through(change), self.values.through(change)
        self.valid = None if self.valid is None else change(self.valid)
        self.columns = None if self.columns is None else change(self.columns)


def left_over(plan: KeepPlan, vision: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (B, Hkv, P) of the vision tokens that a plan does not keep, and (B, P) which count.

    A row's last such token stands in for what it has not.
    """
    heads, longest = plan.columns.shape[1:]
    used = torch.arange(longest, device=vision.device) >= longest - plan.lengths[:, None]
    gone = vision[:, None].repeat(1, heads, 1)
    gone &= ~torch.zeros_like(gone).scatter(2, plan.columns, used[:, None].expand_as(plan.columns))
    count = gone[:, 0].sum(-1)
    most = int(count.max())
    places = torch.arange(most, device=vision.device)
    order = gone.int().argsort(dim=-1, descending=True, stable=True)
    last = (count - 1).clamp(min=0)[:, None]
    near = torch.minimum(places, last)[:, None].expand(-1, heads, -1)
    return order.gather(2, near), places < count[:, None]
