"""The order of slots in a layer with recall: the vision tokens of a row come before its text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.cache import KVStore
from plphp.policy import KeepPlan


@dataclass(frozen=True)
class Vision:
    """The vision tokens of a conversation, numbered from 0 in each row; V is the largest count.

    spans: (B, N) int64, as `plphp.vision_spans` returns them
    tokens: (B,) int64, number of vision tokens in each row
    order: (B, V) int64, the column of each vision token, ascending; rows with fewer than V end with
        other columns as fillers
    valid: (B, V) bool, False for these fillers
    places: (B, N) int64, the position of each column where they do not follow from the spans
    """

    spans: Tensor
    tokens: Tensor
    order: Tensor
    valid: Tensor
    places: Tensor | None = None

    @classmethod
    def of(cls, spans: Tensor, places: Tensor | None = None) -> Vision:
        """The vision tokens of spans (B, N). places: as in the class."""
        vision = spans > 0
        tokens = vision.sum(-1)
        order = vision.int().argsort(dim=-1, descending=True, stable=True)
        order = order[:, : int(tokens.max())]
        return cls(spans, tokens, order, vision.gather(1, order), places)

    @property
    def most(self) -> int:
        """V, the largest number of vision tokens in a row."""
        return self.order.shape[1]

    def text(self, columns: int) -> Tensor:
        """(B,) int64: the number of text tokens in the first `columns` columns.

        Columns after the spans are text.
        """
        spans = self.spans[:, :columns]
        return (spans == 0).sum(-1) + columns - spans.shape[1]

    def text_columns(self, row: int, columns: int) -> Tensor:
        """The columns (text tokens,) int64 of the text of one row, ascending; as in `text`."""
        spans = self.spans[row, :columns]
        return (F.pad(spans, (0, columns - len(spans))) == 0).nonzero()[:, 0]

    def positions(self) -> Tensor:
        """(B, V + 1) int64: row-logical position of each vision token, -1 for fillers and at V."""
        places = (self.spans >= 0).cumsum(-1) - 1 if self.places is None else self.places
        position = places.gather(1, self.order)
        return F.pad(position.masked_fill(~self.valid, -1), (0, 1), value=-1)

    def not_resident(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """The columns (B, Hkv, P) of the vision tokens that are not resident, ascending.

        held: (B, Hkv, k) int64, the numbers of the resident tokens, V for none
        Returns also (B, P) bool, False for fillers, which repeat the last such token of the row.
        """
        heads = held.shape[1]
        parked = F.pad(self.valid, (0, 1))[:, None].repeat(1, heads, 1)
        parked = parked.scatter(2, held, False)[..., : self.most]
        count = parked[:, 0].sum(-1)
        entries = torch.arange(int(count.max()), device=held.device)
        tokens = parked.int().argsort(dim=-1, descending=True, stable=True)
        last = (count - 1).clamp(min=0)[:, None]
        entry = torch.minimum(entries, last)[:, None].expand(-1, heads, -1)
        order = self.order[:, None].expand(-1, heads, -1).gather(2, tokens.gather(2, entry))
        return order, entries < count[:, None]


def vision_first(plan: KeepPlan, spans: Tensor) -> KeepPlan:
    """The same plan with the vision tokens of a row before its text, in its first slots."""
    heads = plan.columns.shape[1]
    vision = (spans > 0)[:, None].expand(-1, heads, -1).gather(2, plan.columns)
    kind = torch.where(plan.valid[:, None], 2 - vision.int(), 0)  # fillers, vision, text
    order = kind.argsort(dim=-1, stable=True)
    return replace(plan, columns=plan.columns.gather(2, order))


def tokens_in_slots(plan: KeepPlan, spans: Tensor, count: Tensor) -> Tensor:
    """(B, Hkv, k) int64: the number of the vision token in each of the first slots, V for none.

    plan: as `vision_first` returns it
    count: (B,) int64, how many vision tokens each KV head of a row keeps; k is the largest
    """
    slots = torch.arange(int(count.max()), device=spans.device)
    place = (slots + plan.start[:, None])[:, None].expand(-1, plan.columns.shape[1], -1)
    columns = plan.columns.gather(2, place.clamp(max=plan.columns.shape[-1] - 1))
    number = (spans > 0).cumsum(-1) - 1
    held = number[:, None].expand(-1, columns.shape[1], -1).gather(2, columns)
    tokens = int((spans > 0).sum(-1).max())
    return held.masked_fill((slots >= count[:, None])[:, None], tokens)


def first_slots(held: Tensor, tokens: int, store: KVStore) -> Tensor:
    """(B, Hkv, end) bool: the slots of a store that hold vision tokens.

    held: (B, Hkv, k), the number of the vision token in each of the first slots of a row
    tokens: V, which stands for no token
    """
    count = (held[:, :1] != tokens).sum(-1, keepdim=True)
    slots = torch.arange(store.end, device=count.device) - store.start[:, None, None]
    return ((slots >= 0) & (slots < count)).expand(-1, held.shape[1], -1)


def positions_of(positions: Tensor, held: Tensor) -> Tensor:
    """(B, Hkv, k) int64: the positions of tokens, ascending, filled up with -1.

    positions: (B, V + 1) int64, as `Vision.positions`; held: (B, Hkv, k), numbers of tokens
    """
    chosen = positions[:, None].expand(-1, held.shape[1], -1).gather(2, held.long())
    last = torch.iinfo(chosen.dtype).max
    chosen = chosen.masked_fill(chosen < 0, last).sort(-1).values
    return chosen.masked_fill(chosen == last, -1)
