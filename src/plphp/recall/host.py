"""The home "host": parked tokens are in main memory, and k of each KV head are resident.

At every step each KV head chooses the k tokens whose keys fit its query best, by a small index on
the device. They are in the first slots of the layer's store, before the text, so that attention
reads one buffer and needs no code for parked tokens. A fetched token takes the slot of one that is
no longer chosen, so only newly chosen tokens are copied to the device.
"""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor

from plphp.attention import attend, decode_attention
from plphp.cache import KVStore, take
from plphp.errors import InputError
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable_tokens, plan_within
from plphp.recall.codes import row_bytes
from plphp.recall.home import Recall
from plphp.recall.index import BITS, KeyIndex, build, index_bytes
from plphp.recall.lanes import in_parts, lane_of
from plphp.recall.serialize import Saved
from plphp.recall.slot_order import (
    Vision,
    first_slots,
    positions_of,
    tokens_in_slots,
    vision_first,
)
from plphp.recall.transfer import exchanges, fetch, largest, to_host, whole_rows


class HostHome:
    """The vision tokens of one layer in main memory, at most V in a row, of which k are resident.

    keys, values: (B, Hkv, V, D) and (B, Hkv, V, Dv) in main memory; rows with fewer than V tokens
        end with fillers
    index: `KeyIndex` of the keys, on the device
    held: (B, Hkv, k) int16 or int32, the number of the vision token in each of the first k slots of
        a row; V in slots that hold none, in rows with fewer than k
    valid: (B, V) bool on the device, False for fillers; None if there are none
    columns: (B, V) int32 on the device, the column of each token; only with a sliding window
    begin: the column after the prompt
    origin: (B,) int64, the row of the prompt from which each row was copied, as beams are
    positions: (B, V + 1) int64 on the CPU, as `Vision.positions`; None without `record`
    chosen: with `every` above 1, pairs of a column and `held` after the choice for it. If guessed
        tokens are removed, an earlier choice becomes valid again
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
        columns: Tensor | None,
    ) -> None:
        """Called by `park` and `restored`.

        parked: keys and values of all vision tokens; columns: as in the class
        """
        self.keys, self.values = map(to_host, parked)
        self.index, self.held, self.begin, self.every = index, held, begin, recall.every
        self.valid = None if bool(vision.valid.all()) else vision.valid
        self.columns = columns
        self.origin = torch.arange(len(held), device=held.device)
        self.positions = vision.positions().cpu() if recall.record else None
        heads, unit = held.shape[1], self.token_bytes
        count = (held[:, 0] != vision.most).sum(-1)  # resident tokens of each row
        self.resident, self.full = (int(x.sum()) * heads * unit for x in (count, vision.tokens))
        fixed = index_bytes(vision.tokens, self.keys.shape[-1], index.basis.shape[2])
        bookkeeping = int((fixed + count * held.element_size()).sum()) * heads
        self.device = self.resident + bookkeeping
        self.plan: KeepPlan | None = None
        self.chosen: list[tuple[int, Tensor]] = []
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    @classmethod
    def check(cls, recall: Recall) -> None:
        """Raise InputError for a budget of 0: a step reads resident tokens only."""
        if recall.budget == 0:
            raise InputError("budget must be above 0: a step reads what the device holds")

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """0: any budget is accepted. At least one token of a KV head is resident."""
        return 0.0

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park all vision tokens. Those with the highest scores are resident at first."""
        vision = Vision.of(look.spans, look.places)
        every_head = vision.order[:, None].expand(-1, store.keys.shape[1], -1)
        keys, values = (take(x, every_head) for x in store.held())
        dim, number = keys.shape[-1], number_type(vision)
        rank = rank_of(recall, dim)
        unit = dim * keys.element_size() + values.shape[-1] * values.element_size()
        fixed, each = index_bytes(vision.tokens, dim, rank), unit + number.itemsize
        count = affordable_tokens(
            recall.budget, vision.tokens, unit, each, fixed, minimum=1, place=place
        )
        plan = vision_first(plan_within(look, count), look.spans)
        held = tokens_in_slots(plan, look.spans, count).to(number)
        index = build(keys, vision.valid, rank)
        columns = None if store.columns is None else store.columns[:, 0].gather(1, vision.order)
        home = cls(recall, vision, (keys, values), index, held, store.logical, columns)
        home.plan = plan
        return home

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """Make a home from its saved form; see `Home.restored`."""
        saved.only(("keys", "values", "held", "index.codes", "index.basis"), ("begin",))
        vision = Vision.of(spans)
        lead, dim, dtype = store.keys.shape[:2], store.keys.shape[-1], store.keys.dtype
        rank = rank_of(recall, dim)
        keys, values = (
            saved.tensor(name, (*lead, vision.most, stored.shape[-1]), dtype)
            for name, stored in (("keys", store.keys), ("values", store.values))
        )
        codes, basis = (
            saved.tensor(f"index.{name}", (*lead, rank, row_bytes(numbers, BITS)), torch.uint8)
            for name, numbers in (("codes", vision.most), ("basis", dim))
        )
        held = saved.held(number_type(vision), store, vision, ascending=False)
        begin = saved.number("begin", 0, store.logical)
        index = KeyIndex(codes, basis, vision.most)
        columns = None if store.window is None else vision.order.int()
        return cls(recall, vision, (keys, values), index, held, begin, columns)

    def saved(self) -> Saved:
        """The parked keys and values, the index, `held` and `begin`."""
        index = {"index.codes": self.index.codes, "index.basis": self.index.basis}
        tokens = {"keys": self.keys, "values": self.values, "held": self.held}
        return Saved({**tokens, **index}, {"begin": self.begin})

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's key and value in one KV head."""
        return sum(x.shape[-1] * x.element_size() for x in (self.keys, self.values))

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns; each chooses its own tokens."""
        queries, outputs = query.shape[2], []
        del self.chosen[:-1]
        if queries == 1:
            self._choose(query, store, store.logical - 1)
            return decode_attention(query, store, scale, softcap)
        for step in range(queries):
            one = query[:, :, step : step + 1]
            self._choose(one, store, store.logical - queries + step)
            visible = store.visible(queries)
            assert visible is not None
            mask = visible[:, :, step : step + 1]
            outputs.append(attend(one, *store.held(), mask, scale, softcap))
        return torch.cat(outputs, 2)

    def _choose(self, query: Tensor, store: KVStore, column: int) -> None:
        """Choose tokens for the query (B, H, 1, D) of a column, and fetch them into the store."""
        if self.every == 1 or not self.chosen or (column - self.begin) % self.every == 0:
            lane = lane_of(self.held.device)
            parts = in_parts(self.held[..., 0].numel(), lane.parts)
            # All scoring is launched before the first fetch, which makes the host wait.
            best = [(self._best(query, store, column, part), lane.mark()) for part in parts]
            fetched = 0
            for part, (tokens, mark) in zip(parts, best, strict=True):
                with lane.copies(mark):
                    fetched += self._swap(tokens, store, part.start)
            lane.join()
            self.fetched.append(fetched)
            if self.every > 1:
                self.chosen.append((column, self.held.clone()))
        else:
            self.fetched.append(0)
        if self.positions is not None:
            self.log.append(positions_of(self.positions, self.held.cpu()))

    def _best(self, query: Tensor, store: KVStore, column: int, part: range) -> Tensor:
        """The tokens (lines, k) that the query (B, H, 1, D) asks for, V in slots that hold none.

        part: the lines, which are KV heads numbered over all rows
        """
        lines, heads = slice(part.start, part.stop), self.held.shape[1]
        row = torch.arange(part.start, part.stop, device=self.held.device) // heads
        index = self.index.through(lambda x: x.flatten(0, 1)[lines, None])
        asking = query.reshape(len(self.held) * heads, -1, 1, query.shape[-1])[lines]
        scores = index.scores(asking)[:, 0]
        if self.valid is not None:
            scores = scores.masked_fill(~self.valid[row], -torch.inf)
        if self.columns is not None and store.window is not None:
            scores = scores.masked_fill(self.columns[row] <= column - store.window, -torch.inf)
        best = largest(scores, self.held.shape[-1], ordered=self.valid is not None)
        none = self.held.flatten(0, 1)[lines] == self.keys.shape[2]
        return best.masked_fill(none, self.keys.shape[2])

    def _swap(self, best: Tensor, store: KVStore, first: int = 0) -> int:
        """Fetch the tokens best (lines from `first`, k) that are not resident; return how many."""
        heads, tokens = self.keys.shape[1:3]
        held = self.held.flatten(0, 1)[first : first + len(best)].long()
        line, slot, source = exchanges(best, held, tokens)
        line += first
        self.held.view(-1)[line * held.shape[-1] + slot] = source.to(self.held.dtype)
        lines = (source + line * tokens).to(self.keys.device)
        row = line // heads
        place = slot + store.start[row] + line * store.keys.shape[2]
        for parked, buffer in ((self.keys, store.keys), (self.values, store.values)):
            fetched = fetch(whole_rows(parked), lines, buffer.device)
            whole_rows(buffer).index_copy_(0, place, fetched)
        if store.columns is not None and self.columns is not None:
            store.columns.view(-1)[place] = self.columns[row, source]
        return len(source)

    def crop(self, store: KVStore, columns: int) -> None:
        """Adapt to a store whose last columns were removed: restore the choice before them."""
        del self.log[max(len(self.log) - columns, 0) :]
        removed = bool(self.chosen) and self.chosen[-1][0] >= store.logical
        while self.chosen and self.chosen[-1][0] >= store.logical:
            self.chosen.pop()
        if removed and self.chosen:
            self.fetched[-1] += self._swap(self.chosen[-1][1].flatten(0, 1).long(), store)

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The keys, mask and vision tokens of the last query; see `Home.looked_at`."""
        return store.held()[0], store.visible(queries), self.vision_slots(store)

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which slots of the store hold vision tokens."""
        return first_slots(self.held, self.keys.shape[2], store)

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in the first slots of a row."""
        held = self.held[row].long()
        held = held[:, held[0] != self.keys.shape[2]]
        assert self.columns is not None
        return self.columns[row].long()[held]

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys (n, D) and values (n, Dv) of every vision token; see `Home.tokens`."""
        heads, device = self.keys.shape[1], self.held.device
        if self.valid is None:
            return self.keys.flatten(0, 2).to(device), self.values.flatten(0, 2).to(device)
        valid = self.valid[:, None].expand(-1, heads, -1).to(self.keys.device)
        return self.keys[valid].to(device), self.values[valid].to(device)

    def tensors(self) -> list[Tensor]:
        """The tensors on the device, besides those of the layer's store."""
        tensors = [*self.index.tensors(), self.held, self.origin]
        return tensors + [x for x in (self.valid, self.columns) if x is not None]

    def parked(self) -> list[Tensor]:
        """The keys and values in main memory."""
        return [self.keys, self.values]

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) of the batch. Beams of one prompt share its parked tokens."""
        rows = rows.to(self.held.device)
        same = len(rows) == len(self.origin) and torch.equal(self.origin[rows], self.origin)
        self.origin = self.origin[rows]
        self.held = self.held[rows]
        self.chosen = [(column, held[rows]) for column, held in self.chosen]
        if self.positions is not None:
            self.positions = self.positions[rows.cpu()]
            self.log[:] = [read[rows.cpu()] for read in self.log]
        if same:
            return
        self.index = self.index.through(lambda x: x[rows])
        self.valid = None if self.valid is None else self.valid[rows]
        self.columns = None if self.columns is None else self.columns[rows]
        self.keys, self.values = (to_host(x[rows.to(x.device)]) for x in (self.keys, self.values))

    def move(self, device: torch.device) -> None:
        """Move the tensors on the device. Parked tokens stay in main memory."""
        if device.type == "cuda":
            self.keys, self.values = self.keys.pin_memory(), self.values.pin_memory()
        self.index = self.index.through(lambda x: x.to(device))
        self.chosen = [(column, held.to(device)) for column, held in self.chosen]
        for name in ("valid", "columns", "held", "origin"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))


def rank_of(recall: Recall, dim: int) -> int:
    """The number of components of a key in the index, at most `dim`."""
    return min(recall.rank or max(dim // 4, 1), dim)


def number_type(vision: Vision) -> torch.dtype:
    """The smallest dtype for the numbers of vision tokens, 0 to V."""
    return torch.int16 if vision.most < 2**15 else torch.int32
