"""Where vision tokens lie in a layer's store: before the text, so that their slots are known."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.cache import KVStore
from plphp.policy import KeepPlan


def vision_first(plan: KeepPlan, spans: Tensor) -> KeepPlan:
    """The same plan with a row's vision tokens before its text, so that their slots are known."""
    heads, longest = plan.columns.shape[1:]
    used = torch.arange(longest, device=spans.device) >= longest - plan.lengths[:, None]
    vision = (spans > 0)[:, None].expand(-1, heads, -1).gather(2, plan.columns)
    kind = torch.where(used[:, None], 2 - vision.int(), 0)  # fillers, vision, text
    order = kind.argsort(dim=-1, stable=True)
    return replace(plan, columns=plan.columns.gather(2, order))


def at_hand(plan: KeepPlan, spans: Tensor, most: Tensor) -> Tensor:
    """(B, Hkv, k) int64: which vision token of its row each of the first slots holds."""
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

    held (B, Hkv, k): which token each of a row's first slots holds, `tokens` where none
    """
    count = (held[:, :1] != tokens).sum(-1, keepdim=True)
    slots = torch.arange(store.end, device=count.device) - store.start[:, None, None]
    return ((slots >= 0) & (slots < count)).expand(-1, held.shape[1], -1)


def places(spans: Tensor, order: Tensor, valid: Tensor) -> Tensor:
    """(B, V + 1) int64: row-logical position of each vision token; -1 for fillers, and as the last.

    spans (B, N); order, valid (B, V): the columns of a row's vision tokens, and which are no filler
    """
    position = ((spans >= 0).cumsum(-1) - 1).gather(1, order)
    return F.pad(position.masked_fill(~valid, -1), (0, 1), value=-1)


def positions(places: Tensor, held: Tensor) -> Tensor:
    """(B, Hkv, k) int64, ascending, -1 pads, of the tokens held (B, Hkv, k) int."""
    found = places[:, None].expand(-1, held.shape[1], -1).gather(2, held.long())
    last = torch.iinfo(found.dtype).max
    found = found.masked_fill(found < 0, last).sort(-1).values
    return found.masked_fill(found == last, -1)
