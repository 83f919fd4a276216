"""Parked in main memory: every KV head has its k best tokens at hand and changes them as it goes.

What is at hand lies in the layer's own buffers among the text, so that attention reads one piece of
memory and knows nothing of this. A token that is fetched takes the slot of one that is not asked
for any more; only what is new crosses the bus.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plphp.attention import attend, decode_attention
from plphp.cache import KVStore, take
from plphp.policy import KeepPlan, Look
from plphp.recall.budget import Place, affordable, plan_within
from plphp.recall.index import build, index_bytes
from plphp.recall.options import Recall
from plphp.recall.slots import at_hand, first_slots, places, positions, vision_first


class HostHome:
    """The vision tokens of one layer, V at most in a row, and which k of them are at hand.

    keys, values: (B, Hkv, V, D) and (B, Hkv, V, Dv) in main memory, rows of fewer end in fillers
    index: on the device
    valid: (B, V) bool on the device, which are no fillers; None where all count
    columns: (B, V) int32 on the device, a token's column, for sliding windows only
    plan: what the store should be compacted to: k vision tokens a KV head, then all text; to be
        taken off then, because it is as long as the store
    held: (B, Hkv, k) int16 or int32, which token each of a row's first k slots holds; V in rows
        that have fewer than k
    full, resident, device: bytes of vision tokens in the full cache, in full on the device, and in
        all on the device; fillers of unequal rows and what a sliding window needs not counted
    fetched: tokens fetched at each step, all rows and KV heads together
    chosen: with `every` above 1, (column, `held`) of the choices that guesses may go back to
    log: (B, Hkv, k) int64 in main memory for each token since the prompt, the row-logical positions
        that it read, ascending, -1 pads; empty unless recorded
    """

    def __init__(self, store: KVStore, look: Look, recall: Recall, place: Place) -> None:
        """Park the vision tokens of a store that holds the whole prompt.

        look: whom the policy would keep
        """
        vision = look.spans > 0
        tokens = vision.sum(-1)
        order = vision.int().argsort(dim=-1, descending=True, stable=True)
        order = order[:, : int(tokens.max())]
        valid = vision.gather(1, order)
        self.origin = torch.arange(len(vision), device=vision.device)
        self.held = self.origin.new_empty(0)
        every_head = order[:, None].expand(-1, store.keys.shape[1], -1)
        keys, values = (take(x, every_head) for x in store.held())
        self.valid = None if bool(valid.all()) else valid
        self.columns = order.int() if store.window is not None else None
        dim = keys.shape[-1]
        rank = min(recall.rank or dim // 4, dim)
        self.index = build(keys, valid, rank)
        self.keys, self.values = to_host(keys), to_host(values)
        number = torch.int16 if keys.shape[2] < 2**15 else torch.int32
        unit = self.token_bytes
        fixed = index_bytes(tokens, dim, rank)
        most = affordable(
            recall.budget, tokens, unit, unit + number.itemsize, fixed, least=1, place=place
        )
        plan = vision_first(plan_within(look, most), look.spans)
        self.held = at_hand(plan, look.spans, most).to(number)
        self.plan: KeepPlan | None = plan
        heads = keys.shape[1]
        self.resident, self.full = (int(x.sum()) * heads * unit for x in (most, tokens))
        numbers = int((fixed + most * number.itemsize).sum()) * heads
        self.device = self.resident + numbers
        self.every, self.begin = recall.every, store.logical
        self.chosen: list[tuple[int, Tensor]] = []
        self.places = places(look.spans, order, valid).cpu() if recall.record else None
        self.fetched: list[int] = []
        self.log: list[Tensor] = []

    @property
    def tokens_a_row(self) -> int:
        """V."""
        return self.keys.shape[2]

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


def largest(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """Where the k largest of scores (..., V) float32 are, (..., k) int64; largest first if asked.

    On the CPU numpy finds them in a quarter of the time of topk.
    """
    if ordered or scores.device.type != "cpu":
        return scores.topk(k, sorted=ordered).indices
    rest = scores.shape[-1] - k
    return torch.from_numpy(np.argpartition(scores.detach().numpy(), rest, -1)[..., rest:])


def to_host(x: Tensor) -> Tensor:
    """In main memory, pinned where a GPU copies from there."""
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def whole_rows(x: Tensor) -> Tensor:
    """(..., D) contiguous as a matrix of rows, in pieces of 16 bytes where that is possible.

    What copies rows by their numbers goes piece by piece on the CPU.
    """
    rows = x.view(-1, x.shape[-1])
    wide = rows.shape[1] * x.element_size() % 16 == 0
    return rows.view(torch.complex128) if wide else rows


def fetch(parked: Tensor, lines: Tensor, device: torch.device) -> Tensor:
    """Lines of a matrix in main memory, on the device."""
    if device.type != "cuda":
        return parked.index_select(0, lines).to(device)
    staged = torch.empty(len(lines), parked.shape[1], dtype=parked.dtype, pin_memory=True)
    torch.index_select(parked, 0, lines, out=staged)
    return staged.to(device, non_blocking=True)
