"""Parked in main memory: every KV head has its k best tokens at hand and changes them as it goes.

What is at hand lies in the layer's own buffers among the text, so that attention reads one piece of
memory and does not know of parked tokens. A fetched token takes the slot of one that is not asked
for any more; only new tokens cross the bus.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from plphp.attention import attend, decode_attention
from plphp.cache import KVStore, take
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable, plan_within
from plphp.recall.codes import row_bytes
from plphp.recall.home import Recall
from plphp.recall.index import BITS, KeyIndex, build, index_bytes
from plphp.recall.serialize import Saved
from plphp.recall.slot_order import Vision, at_hand, first_slots, positions, vision_first
from plphp.recall.transfer import fetch, largest, to_host, whole_rows


class HostHome:
    """The vision tokens of one layer, V at most in a row, and which k of them are at hand.

    keys, values: (B, Hkv, V, D) and (B, Hkv, V, Dv) in main memory, rows of fewer end in fillers
    index: on the device
    held: (B, Hkv, k) int16 or int32, which token each of a row's first k slots holds; V in rows
        that have fewer than k
    valid: (B, V) bool on the device, which tokens are no fillers; None where all count
    columns: (B, V) int32 on the device, a token's column, for sliding windows only
    begin: column of the first token after the prompt
    origin: (B,) row of the prompt that each row is a copy of
    places: (B, V + 1) as `Vision.places`, on the CPU; None unless recorded
    chosen: with `every` above 1, (column, `held`) of the choices that guesses may go back to
    plan, full, resident, device, fetched, log: as in `Home`
    """

    where: ClassVar[str] = "in main memory"
    exact: ClassVar[bool] = True
    options: ClassVar[frozenset[str]] = frozenset(("rank", "every", "record"))

    def __init__(
        self,
        recall: Recall,
        vision: Vision,
        parked: tuple[Tensor, Tensor],
        index: KeyIndex,
        held: Tensor,
        begin: int,
        windowed: bool,
    ) -> None:
        """A home of the parked keys and values; `park` and `restored` make one."""
        self.keys, self.values = map(to_host, parked)
        self.index, self.held, self.begin, self.every = index, held, begin, recall.every
        self.valid = None if bool(vision.valid.all()) else vision.valid
        self.columns = vision.order.int() if windowed else None
        self.origin = torch.arange(len(held), device=held.device)
        self.places = vision.places().cpu() if recall.record else None
        heads, unit = held.shape[1], self.token_bytes
        most = (held[:, 0] != vision.most).sum(-1)
        self.resident, self.full = (int(x.sum()) * heads * unit for x in (most, vision.tokens))
        fixed = index_bytes(vision.tokens, self.keys.shape[-1], index.basis.shape[2])
        numbers = int((fixed + most * held.element_size()).sum()) * heads
        self.device = self.resident + numbers
        self.plan: KeepPlan | None = None
        self.chosen: list[tuple[int, Tensor]] = []
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    @classmethod
    def check(cls, recall: Recall) -> None:
        """A step reads what the device holds: that cannot be nothing."""
        if recall.budget == 0:
            raise ValueError("budget must be above 0: a step reads what the device holds")

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """0: a budget that is too small for the index is exceeded by one token a head."""
        return 0.0

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park all vision tokens, and plan to hold the policy's best in full at first."""
        vision = Vision.of(look.spans)
        every_head = vision.order[:, None].expand(-1, store.keys.shape[1], -1)
        keys, values = (take(x, every_head) for x in store.held())
        dim, number = keys.shape[-1], number_type(vision)
        rank = rank_of(recall, dim)
        unit = dim * keys.element_size() + values.shape[-1] * values.element_size()
        fixed, each = index_bytes(vision.tokens, dim, rank), unit + number.itemsize
        most = affordable(recall.budget, vision.tokens, unit, each, fixed, least=1, place=place)
        plan = vision_first(plan_within(look, most), look.spans)
        held = at_hand(plan, look.spans, most).to(number)
        index = build(keys, vision.valid, rank)
        windowed = store.window is not None
        home = cls(recall, vision, (keys, values), index, held, store.logical, windowed)
        home.plan = plan
        return home

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """The home that `saved` described; see `Home.restored`."""
        saved.only(("keys", "values", "held", "index.codes", "index.basis"), ("begin",))
        vision = Vision.of(spans)
        lead, dim, dtype = store.keys.shape[:2], store.keys.shape[-1], store.keys.dtype
        rank = rank_of(recall, dim)
        keys, values = (
            saved.tensor(name, (*lead, vision.most, own.shape[-1]), dtype)
            for name, own in (("keys", store.keys), ("values", store.values))
        )
        codes, basis = (
            saved.tensor(f"index.{name}", (*lead, rank, row_bytes(numbers, BITS)), torch.uint8)
            for name, numbers in (("codes", vision.most), ("basis", dim))
        )
        held = saved.held(number_type(vision), store, vision, ascending=False)
        begin = saved.number("begin", 0, store.logical)
        index = KeyIndex(codes, basis, vision.most)
        return cls(recall, vision, (keys, values), index, held, begin, store.window is not None)

    def saved(self) -> Saved:
        """keys, values: as parked; index.codes, index.basis; held; and the number begin."""
        index = {"index.codes": self.index.codes, "index.basis": self.index.basis}
        own = {"keys": self.keys, "values": self.values, "held": self.held}
        return Saved({**own, **index}, {"begin": self.begin})

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value."""
        return sum(x.shape[-1] * x.element_size() for x in (self.keys, self.values))

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns: each reads what it chooses."""
        queries, outputs = query.shape[2], []
        del self.chosen[:-1]
        if queries == 1:
            self._choose(query, store, store.logical - 1)
            return decode_attention(query, store, scale, softcap)
        for step in range(queries):
            asked = query[:, :, step : step + 1]
            self._choose(asked, store, store.logical - queries + step)
            visible = store.visible(queries)
            assert visible is not None
            one = visible[:, :, step : step + 1]
            outputs.append(attend(asked, *store.held(), one, scale, softcap))
        return torch.cat(outputs, 2)

    def _choose(self, query: Tensor, store: KVStore, column: int) -> None:
        """Bring what the query (B, H, 1, D) of a column looks for into the store."""
        if self.every == 1 or not self.chosen or (column - self.begin) % self.every == 0:
            scores = self.index.scores(query)
            if self.valid is not None:
                scores = scores.masked_fill(~self.valid[:, None], -torch.inf)
            if self.columns is not None and store.window is not None:
                far = self.columns <= column - store.window
                scores = scores.masked_fill(far[:, None], -torch.inf)
            best = largest(scores, self.held.shape[-1], ordered=self.valid is not None)
            filler = self.keys.shape[2]
            self.fetched.append(self._swap(best.masked_fill(self.held == filler, filler), store))
            if self.every > 1:
                self.chosen.append((column, self.held.clone()))
        else:
            self.fetched.append(0)
        if self.places is not None:
            self.log.append(positions(self.places, self.held.cpu()))

    def _swap(self, best: Tensor, store: KVStore) -> int:
        """Put the tokens best (B, Hkv, k) where others lie that are not among them; how many."""
        heads, tokens = self.keys.shape[1:3]
        held = self.held.long()
        none = torch.zeros(*best.shape[:2], tokens + 1, dtype=torch.bool, device=best.device)
        wanted, there = (none.scatter(2, x, True) for x in (best, held))
        # As many come as go in every head, so that both lists are in the same order of heads.
        old = (~wanted.gather(2, held)).flatten().nonzero()[:, 0]
        new = (wanted & ~there).flatten().nonzero()[:, 0]
        line, slot = old // held.shape[-1], old % held.shape[-1]
        source = new - line * (tokens + 1)
        self.held.view(-1)[old] = source.to(self.held.dtype)
        lines = (source + line * tokens).to(self.keys.device)
        row = line // heads
        place = slot + store.start[row] + line * store.keys.shape[2]
        for parked, buffer in ((self.keys, store.keys), (self.values, store.values)):
            came = fetch(whole_rows(parked), lines, buffer.device)
            whole_rows(buffer).index_copy_(0, place, came)
        if store.positions is not None and self.columns is not None:
            store.positions.view(-1)[place] = self.columns[row, source]
        return len(source)

    def crop(self, store: KVStore, columns: int) -> None:
        """A store has forgotten its last columns: have at hand what the one before them chose."""
        del self.log[max(len(self.log) - columns, 0) :]
        late = bool(self.chosen) and self.chosen[-1][0] >= store.logical
        while self.chosen and self.chosen[-1][0] >= store.logical:
            self.chosen.pop()
        if late and self.chosen:
            self.fetched[-1] += self._swap(self.chosen[-1][1].long(), store)

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the last query read: keys (B, Hkv, S, D), who sees them, and which are vision's.

        The second is as `KVStore.visible`, the third (B, Hkv, S) bool.
        """
        return store.held()[0], store.visible(queries), self.vision_slots(store)

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which of a store's slots hold vision tokens."""
        return first_slots(self.held, self.keys.shape[2], store)

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in a row's first slots."""
        held = self.held[row].long()
        held = held[:, held[0] != self.keys.shape[2]]
        assert self.columns is not None
        return self.columns[row].long()[held]

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens of all rows and heads, D) of every vision token, in order."""
        heads, device = self.keys.shape[1], self.held.device
        if self.valid is None:
            return self.keys.flatten(0, 2).to(device), self.values.flatten(0, 2).to(device)
        every = self.valid[:, None].expand(-1, heads, -1).to(self.keys.device)
        return self.keys[every].to(device), self.values[every].to(device)

    def tensors(self) -> list[Tensor]:
        """What lies on the device besides the layer's own buffers."""
        maybe = (self.valid, self.columns)
        own = [*self.index.tensors(), self.held, self.origin]
        return own + [x for x in maybe if x is not None]

    def parked(self) -> list[Tensor]:
        """What lies in main memory."""
        return [self.keys, self.values]

    def reorder(self, rows: Tensor) -> None:
        """Rows (B',) of the batch. Beams of a prompt share what it parked: nothing is copied."""
        rows = rows.to(self.held.device)
        same = len(rows) == len(self.origin) and torch.equal(self.origin[rows], self.origin)
        self.origin = self.origin[rows]
        self.held = self.held[rows]
        self.chosen = [(column, held[rows]) for column, held in self.chosen]
        if self.places is not None:
            self.places = self.places[rows.cpu()]
            self.log[:] = [read[rows.cpu()] for read in self.log]
        if same:
            return
        self.index = self.index.through(lambda x: x[rows])
        self.valid = None if self.valid is None else self.valid[rows]
        self.columns = None if self.columns is None else self.columns[rows]
        self.keys, self.values = (to_host(x[rows.to(x.device)]) for x in (self.keys, self.values))

    def move(self, device: torch.device) -> None:
        """Move what lies on the device; what is parked stays in main memory."""
        if device.type == "cuda":
            self.keys, self.values = self.keys.pin_memory(), self.values.pin_memory()
        self.index = self.index.through(lambda x: x.to(device))
        self.chosen = [(column, held.to(device)) for column, held in self.chosen]
        for name in ("valid", "columns", "held", "origin"):
            found = getattr(self, name)
            setattr(self, name, None if found is None else found.to(device))


def rank_of(recall: Recall, dim: int) -> int:
    """Directions of the index of keys of `dim` numbers."""
    return min(recall.rank or max(dim // 4, 1), dim)


def number_type(vision: Vision) -> torch.dtype:
    """The dtype of a token's number."""
    return torch.int16 if vision.most < 2**15 else torch.int32
