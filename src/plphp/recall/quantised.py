"""Parked on the device in few bits: what is not kept in full is demoted, and all of it is read.

Nothing is chosen while an answer is written. Blocks of codes are made numbers again where attention
reads them, keys first and then values, so that a whole layer is never dense at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor

from plphp.attention import coded_attention, decode_attention, side_by_side
from plphp.cache import KVStore, take
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable, plan_within
from plphp.recall.codes import (
    KeyCodes,
    ValueCodes,
    code_bytes,
    code_share,
    key_bytes,
    keys_to_codes,
    one_more,
    row_bytes,
    values_to_codes,
)
from plphp.recall.home import Recall
from plphp.recall.serialize import Saved
from plphp.recall.slot_order import Vision, at_hand, first_slots, vision_first


class QuantisedHome:
    """The vision tokens of one layer that are not kept in full: P of a row's V in a KV head.

    keys, values: their codes, rows of fewer tokens end in fillers
    held: (B, Hkv, k) int64 in main memory, which token of its row each of the first k slots holds,
        ascending; V where none
    valid: (B, P) bool, which tokens are no fillers; None where all count
    columns: (B, Hkv, P) int32, a token's column, for sliding windows only
    first: (B, V) int64 in main memory, the column of every token, for sliding windows only
    count: (B,) int64 in main memory, vision tokens of each row
    most: V
    plan, full, resident, device, fetched, log: as in `Home`
    """

    bits: ClassVar[int]
    where: ClassVar[str]
    exact: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, vision: Vision, keys: KeyCodes, values: ValueCodes, held: Tensor, store: KVStore
    ) -> None:
        """A home of codes; `park` and `restored` make one. held: on the device of `vision`."""
        order, valid = vision.left_over(held)
        windowed = store.window is not None
        self.keys, self.values, self.held = keys, values, held.cpu()
        self.valid = None if bool(valid.all()) else valid
        self.columns = order.int() if windowed else None
        self.first = vision.order.cpu() if windowed else None
        self.count, self.most = vision.tokens.cpu(), vision.most
        self.token_bytes = unit_of(store)
        heads, dims = held.shape[1], (keys.dim, values.dim)
        most = (held[:, 0] != vision.most).sum(-1)
        self.resident, self.full = (
            int(x.sum()) * heads * self.token_bytes for x in (most, vision.tokens)
        )
        parked = code_bytes(vision.tokens - most, dims, self.bits)
        self.device = self.resident + int(parked.sum()) * heads
        self.plan: KeepPlan | None = None
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    @classmethod
    def check(cls, recall: Recall) -> None:
        """Every budget goes: 0 holds nothing in full."""

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """What codes take of full keys and values, as the prompt grows."""
        return code_share(dim, cls.bits, itemsize)

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park what the policy ranks lowest, and plan to hold the rest in full."""
        keys, values = store.held()
        vision, dims = Vision.of(look.spans), (keys.shape[-1], values.shape[-1])
        unit = unit_of(store)
        filled = 2 * dims[0]  # bytes that the last tokens' rows may be filled up with
        small = code_bytes(vision.tokens, dims, cls.bits) + filled
        each = unit - one_more(dims, cls.bits)
        most = affordable(recall.budget, vision.tokens, unit, each, small, least=0, place=place)
        plan = vision_first(plan_within(look, most), look.spans)
        held = at_hand(plan, look.spans, most)
        order, _ = vision.left_over(held)
        coded_keys = keys_to_codes(take(keys, order), cls.bits)
        coded_values = values_to_codes(take(values, order), cls.bits)
        home = cls(vision, coded_keys, coded_values, held, store)
        home.plan = plan
        return home

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """The home that `saved` described; see `Home.restored`."""
        saved.only(("keys.codes", "values.codes", "held"))
        vision, lead = Vision.of(spans), store.keys.shape[:2]
        dim, value_dim = store.keys.shape[-1], store.values.shape[-1]
        held = saved.held(torch.int64, store, vision, ascending=True)
        parked = vision.left_over(held)[0].shape[2]
        keys = saved.tensor("keys.codes", (*lead, key_bytes(parked, dim, cls.bits)), torch.uint8)
        row = row_bytes(value_dim, cls.bits)
        values = saved.tensor("values.codes", (*lead, parked, row), torch.uint8)
        return cls(
            vision,
            KeyCodes(keys, cls.bits, parked, dim),
            ValueCodes(values, cls.bits, value_dim),
            held,
            store,
        )

    def saved(self) -> Saved:
        """keys.codes, values.codes: as `plphp.recall.codes` packs them; held."""
        codes = {"keys.codes": self.keys.packed, "values.codes": self.values.packed}
        return Saved({**codes, "held": self.held})

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns over what is held and parked."""
        if not self.keys.tokens:  # an early layer that holds everything in full
            return decode_attention(query, store, scale, softcap)
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
        return first_slots(self.held.to(store.start.device), self.most, store)

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in a row's first slots."""
        held = self.held[row]
        assert self.first is not None
        return self.first[row][held[:, held[0] != self.most]]

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens of all rows and heads, D) of every vision token, in order."""
        batch, heads = self.held.shape[:2]
        most = self.most
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
        own = rows.cpu()
        self.held, self.count = self.held[own], self.count[own]
        self.first = None if self.first is None else self.first[own]
        self._through(lambda x: x[rows.to(x.device)])

    def move(self, device: torch.device) -> None:
        self._through(lambda x: x.to(device))

    def _through(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = self.keys.through(change), self.values.through(change)
        self.valid = None if self.valid is None else change(self.valid)
        self.columns = None if self.columns is None else change(self.columns)


class Int4Home(QuantisedHome):
    """Parked in 4 bits a number."""

    bits = 4
    where = "in int4"


class Int2Home(QuantisedHome):
    """Parked in 2 bits a number."""

    bits = 2
    where = "in int2"


def unit_of(store: KVStore) -> int:
    """Bytes of one token's key and value in full."""
    return sum(x.shape[-1] * x.element_size() for x in (store.keys, store.values))
