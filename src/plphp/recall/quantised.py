"""The homes "int4" and "int2": tokens that are not resident are on the device, in codes.

Every decode step attends to all vision tokens, so nothing is chosen after the prompt.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable_tokens, plan_within
from plphp.recall.coded_tokens import CodedTokens, restored_codes
from plphp.recall.codes import (
    KeyCodes,
    ValueCodes,
    code_bytes,
    code_share,
    keys_to_codes,
    one_more,
    values_to_codes,
)
from plphp.recall.home import Recall
from plphp.recall.serialize import Saved
from plphp.recall.slot_order import Vision, first_slots, tokens_in_slots, vision_first


class QuantisedHome(CodedTokens):
    """The codes of the vision tokens of one layer that are not resident, P of V in a KV head.

    held: (B, Hkv, k) int64 in main memory, the number of the vision token in each of the first k
        slots of a row, ascending; V for none
    keys, values, valid, columns: as in `CodedTokens`
    token_columns: (B, V) int64 in main memory, the column of each vision token; only with a sliding
        window
    count: (B,) int64 in main memory, number of vision tokens in each row
    most: V, the largest of them
    plan, full, resident, device, fetched, log: as in `Home`
    """

    bits: ClassVar[int]
    where: ClassVar[str]
    exact: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(
        self, vision: Vision, keys: KeyCodes, values: ValueCodes, held: Tensor, store: KVStore
    ) -> None:
        """Called by `park` and `restored`. held: on the device of `vision`."""
        order, valid = vision.not_resident(held)
        windowed = store.window is not None
        super().__init__(keys, values, valid, order.int() if windowed else None)
        self.held = held.cpu()
        self.token_columns = vision.order.cpu() if windowed else None
        self.count, self.most = vision.tokens.cpu(), vision.most
        self.token_bytes = unit_of(store)
        heads, dims = held.shape[1], (keys.dim, values.dim)
        resident = (held[:, 0] != vision.most).sum(-1)  # resident tokens of each row
        self.resident, self.full = (
            int(x.sum()) * heads * self.token_bytes for x in (resident, vision.tokens)
        )
        parked = code_bytes(vision.tokens - resident, dims, self.bits)
        self.device = self.resident + int(parked.sum()) * heads
        self.plan: KeepPlan | None = None
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    @classmethod
    def check(cls, recall: Recall) -> None:
        """Accept every budget: with 0 no token is resident."""

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """The bytes of codes as a share of the full bytes, for long prompts."""
        return code_share(dim, cls.bits, itemsize)

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park the tokens with the lowest scores. The others are resident."""
        keys, values = store.held()
        vision, dims = Vision.of(look.spans), (keys.shape[-1], values.shape[-1])
        unit = unit_of(store)
        filled = 2 * dims[0]  # bytes by which the rows of the last tokens may be filled up
        fixed = code_bytes(vision.tokens, dims, cls.bits) + filled
        each = unit - one_more(dims, cls.bits)
        count = affordable_tokens(
            recall.budget, vision.tokens, unit, each, fixed, minimum=0, place=place
        )
        plan = vision_first(plan_within(look, count), look.spans)
        held = tokens_in_slots(plan, look.spans, count)
        order, _ = vision.not_resident(held)
        coded_keys = keys_to_codes(keys, cls.bits, order)
        coded_values = values_to_codes(values, cls.bits, order)
        home = cls(vision, coded_keys, coded_values, held, store)
        home.plan = plan
        return home

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """Make a home from its saved form; see `Home.restored`."""
        saved.only(("keys.codes", "values.codes", "held"))
        vision = Vision.of(spans)
        held = saved.held(torch.int64, store, vision, ascending=True)
        parked = vision.not_resident(held)[0].shape[2]
        return cls(vision, *restored_codes(saved, store, parked, cls.bits), held, store)

    def saved(self) -> Saved:
        """The codes, and `held`."""
        return Saved({**self.saved_codes(), "held": self.held})

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The keys, mask and vision tokens of the last queries; see `Home.looked_at`.

        The slots of the store come first, then the tokens in codes, decoded.
        """
        keys, parked = store.held()[0], self.keys.dense(store.keys.dtype)
        coded = self.present()[:, None].expand(parked.shape[:3])
        vision = torch.cat([self.vision_slots(store), coded], 2)
        return torch.cat([keys, parked], 2), self.visible(store, queries), vision

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which slots of the store hold vision tokens."""
        return first_slots(self.held.to(store.start.device), self.most, store)

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in the first slots of a row."""
        held = self.held[row]
        assert self.token_columns is not None
        return self.token_columns[row][held[:, held[0] != self.most]]

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys (n, D) and values (n, Dv) of every vision token; see `Home.tokens`."""
        batch, heads = self.held.shape[:2]
        most = self.most
        parked = torch.ones(batch, heads, most + 1, dtype=torch.bool)
        parked.scatter_(2, self.held, False)
        exists = torch.arange(most) < self.count[:, None]
        parked = (parked[..., :most] & exists[:, None]).to(store.start.device)
        exists = exists[:, None].expand(-1, heads, -1).to(parked.device)
        resident = exists & ~parked
        # Both the slots and the codes are in the order of the tokens.
        slots = self.vision_slots(store)
        tensors = []
        valid = self.present()[:, None].expand(self.values.packed.shape[:3])
        dense = self.keys.dense, self.values.dense
        for stored, decode in zip(store.held(), dense, strict=True):
            every = stored.new_zeros(*parked.shape, stored.shape[-1])
            every[resident] = stored[slots]
            every[parked] = decode(every.dtype)[valid]
            tensors.append(every[exists])
        return tensors[0], tensors[1]

    def crop(self, store: KVStore, columns: int) -> None:
        """Do nothing: the codes do not depend on the columns after the prompt."""

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) int64 of the batch, in any order and also repeated."""
        on_host = rows.cpu()
        self.held, self.count = self.held[on_host], self.count[on_host]
        if self.token_columns is not None:
            self.token_columns = self.token_columns[on_host]
        super().reorder(rows)


class Int4Home(QuantisedHome):
    """The home "int4": codes of 4 bits a number."""

    bits = 4
    where = "in int4"


class Int2Home(QuantisedHome):
    """The home "int2": codes of 2 bits a number."""

    bits = 2
    where = "in int2"


def unit_of(store: KVStore) -> int:
    """Bytes of one token's key and value in one KV head, in the model's dtype."""
    return sum(x.shape[-1] * x.element_size() for x in (store.keys, store.values))
