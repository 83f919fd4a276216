"""The prompt's last queries, whose attention is scored, and the slots that each may attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.cache import KVStore, take, without_gaps
from plphp.hf.prompt import Prefill
from plphp.policy.view import TEXT


@dataclass(frozen=True)
class LastQueries:
    """The queries of each row's last W prompt tokens in one layer of C slots.

    spans: (B, C) int64 of the layer's slots
    slots: (B, W) int64 slot of each of these tokens; -1 where a row has fewer tokens, or where the
        token's query was not computed in this forward
    place: (B, W) int64 index of their queries among those that were computed
    visible: (B, W, C) bool, the slots that each of them may attend to
    """

    spans: Tensor
    slots: Tensor
    place: Tensor
    visible: Tensor


def last_queries(
    prefill: Prefill, store: KVStore, queries: int, first: int, window: int
) -> LastQueries:
    """The queries of the last `window` prompt tokens of each row, at most as many as there are.

    queries: how many queries this forward computed
    first: the column of the first of them
    """

    def compute() -> LastQueries:
        spans = slot_spans(prefill, store.start, store.end)
        slots = last_columns(spans, min(window, queries))
        place = slots + (store.logical - store.end) - first  # the last slot is the last column
        slots = slots.masked_fill((place < 0) | (place >= queries), -1)
        all_slots = torch.arange(store.end, device=spans.device)
        visible = (all_slots <= slots[..., None]) & (spans >= 0)[:, None]
        return LastQueries(spans, slots, place.clamp(0, queries - 1), visible)

    key = ("last queries", store.end, queries, first, window, store.start.device)
    return prefill.once(key, compute)


def slot_spans(prefill: Prefill, start: Tensor, end: int) -> Tensor:
    """Spans (B, end) int64 of a layer's slots: earlier turns count as text, fillers as padding.

    start: (B,) int64 first slot of each row; end: number of slots in use
    """
    spans = prefill.entered.spans.to(start.device)
    earlier = torch.zeros(len(spans), end - spans.shape[1], dtype=spans.dtype, device=start.device)
    # Slots of earlier turns were moved over the fillers.
    if prefill.remaining is not None and prefill.here is None:
        spans = spans.clamp(min=TEXT)
    slots = torch.cat([earlier, spans], -1)
    return slots.masked_fill(torch.arange(end, device=start.device) < start[:, None], -1)


def slot_positions(prefill: Prefill, end: int) -> Tensor:
    """Position (B, end) int64 of the token in each slot; 0 in the slots of earlier turns."""

    def padded() -> Tensor:
        positions = prefill.entered.positions()
        return torch.nn.functional.pad(positions, (end - positions.shape[1], 0))

    return prefill.once(("positions", end), padded)


def last_columns(spans: Tensor, count: int) -> Tensor:
    """(B, count) int64: the slots of the last tokens of each row, ascending.

    spans: (B, N) int64, -1 for padding. A row with fewer tokens than `count` begins with -1.
    """
    slots = torch.arange(spans.shape[1], device=spans.device)
    last = torch.where(spans >= 0, slots, -1).topk(min(count, spans.shape[1]), sorted=True)
    return last.values.flip(-1)


def with_recent(recent: Tensor | None, query: Tensor, fillers: Tensor | None) -> Tensor:
    """Queries (B, H, T, D) of a forward, with the last ones of earlier chunks before them.

    recent: (B, H, R, D) of earlier chunks, or None
    fillers: (B,) int64, how many of the new queries are fillers; None for none. As in the store,
        they change places with the queries of earlier chunks
    """
    if recent is None:
        return query
    whole, at = torch.cat([recent, query], 2), recent.shape[2]
    if fillers is None:
        return whole
    places = without_gaps(fillers.to(whole.device), at, whole.shape[2])
    return take(whole, places[:, None].expand(-1, whole.shape[1], -1))
