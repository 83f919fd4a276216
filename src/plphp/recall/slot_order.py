"""Where vision tokens lie in a layer's store: before the text, so that their slots are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.cache import KVStore
from plphp.policy import KeepPlan


@dataclass(frozen=True)
class Vision:
    """The vision tokens of a conversation's rows, numbered from 0 in each row; V is the most.

    spans: (B, N) int64, as `plphp.vision_spans` returns them
    tokens: (B,) int64, how many vision tokens a row has
    order: (B, V) int64, their columns, ascending; rows of fewer end in other columns
    valid: (B, V) bool, which columns of `order` are vision tokens
    """

    spans: Tensor
    tokens: Tensor
    order: Tensor
    valid: Tensor

    @classmethod
    def of(cls, spans: Tensor) -> Vision:
        """The vision tokens of spans (B, N)."""
        vision = spans > 0
        tokens = vision.sum(-1)
        order = vision.int().argsort(dim=-1, descending=True, stable=True)
        order = order[:, : int(tokens.max())]
        return cls(spans, tokens, order, vision.gather(1, order))

    @property
    def most(self) -> int:
        """V."""
        return self.order.shape[1]

    def text(self, columns: int) -> Tensor:
        """(B,) int64: text tokens among so many columns; columns after the spans are text."""
        spans = self.spans[:, :columns]
        return (spans == 0).sum(-1) + columns - spans.shape[1]

    def text_columns(self, row: int, columns: int) -> Tensor:
        """(text tokens,) int64: their columns in a row, ascending, as in `text`."""
        spans = self.spans[row, :columns]
        return (F.pad(spans, (0, columns - len(spans))) == 0).nonzero()[:, 0]

    def places(self) -> Tensor:
        """(B, V + 1) int64: row-logical position of each vision token, -1 for fillers and at V."""
        position = ((self.spans >= 0).cumsum(-1) - 1).gather(1, self.order)
        return F.pad(position.masked_fill(~self.valid, -1), (0, 1), value=-1)

    def left_over(self, held: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (B, Hkv, P) of the vision tokens that are not held, and (B, P) which count.

        held: (B, Hkv, k) int64, which tokens are, V where none
        A row's last such token stands in for what it has not.
        """
        heads = held.shape[1]
        gone = F.pad(self.valid, (0, 1))[:, None].repeat(1, heads, 1)
        gone = gone.scatter(2, held, False)[..., : self.most]
        count = gone[:, 0].sum(-1)
        places = torch.arange(int(count.max()), device=held.device)
        tokens = gone.int().argsort(dim=-1, descending=True, stable=True)
        last = (count - 1).clamp(min=0)[:, None]
        near = torch.minimum(places, last)[:, None].expand(-1, heads, -1)
        order = self.order[:, None].expand(-1, heads, -1).gather(2, tokens.gather(2, near))
        return order, places < count[:, None]


def vision_first(plan: KeepPlan, spans: Tensor) -> KeepPlan:
    """The same plan with a row's vision tokens before its text, so that their slots are known."""
    heads, longest = plan.columns.shape[1:]
    used = torch.arange(longest, device=spans.device) >= longest - plan.lengths[:, None]
    vision = (spans > 0)[:, None].expand(-1, heads, -1).gather(2, plan.columns)
    kind = torch.where(used[:, None], 2 - vision.int(), 0)  # fillers, vision, text
    order = kind.argsort(dim=-1, stable=True)
    return replace(plan, columns=plan.columns.gather(2, order))


def at_hand(plan: KeepPlan, spans: Tensor, most: Tensor) -> Tensor:
    """(B, Hkv, k) int64: which vision token of its row each of the first slots holds, V for none.

    plan: with vision first; most: (B,) int64, how many a row holds
    """
    slots = torch.arange(int(most.max()), device=spans.device)
    start = plan.columns.shape[-1] - plan.lengths
    place = (slots + start[:, None])[:, None].expand(-1, plan.columns.shape[1], -1)
    columns = plan.columns.gather(2, place.clamp(max=plan.columns.shape[-1] - 1))
    number = (spans > 0).cumsum(-1) - 1
    held = number[:, None].expand(-1, columns.shape[1], -1).gather(2, columns)
    tokens = int((spans > 0).sum(-1).max())
    return held.masked_fill((slots >= most[:, None])[:, None], tokens)


def first_slots(held: Tensor, tokens: int, store: KVStore) -> Tensor:
    """(B, Hkv, end) bool: the slots of a store that hold vision tokens.

    held: (B, Hkv, k), which token each of a row's first slots holds, `tokens` where none
    """
    count = (held[:, :1] != tokens).sum(-1, keepdim=True)
    slots = torch.arange(store.end, device=count.device) - store.start[:, None, None]
    return ((slots >= 0) & (slots < count)).expand(-1, held.shape[1], -1)


def positions(places: Tensor, held: Tensor) -> Tensor:
    """(B, Hkv, k) int64, ascending, -1 pads, of the tokens held (B, Hkv, k) int."""
    found = places[:, None].expand(-1, held.shape[1], -1).gather(2, held.long())
    last = torch.iinfo(found.dtype).max
    found = found.masked_fill(found < 0, last).sort(-1).values
    return found.masked_fill(found == last, -1)
