"""One prompt on its way into a cache: its columns, its images, its plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.errors import InputError
from plphp.hf.leaving import Leaving
from plphp.hf.vision_mask import Mask, mask_columns
from plphp.models import find_spans, processor_inputs
from plphp.policy import KeepPlan

Made = TypeVar("Made")


@dataclass
class Turn:
    """A prompt of `length` new columns, the first at column `begin` of its conversation.

    source: the keyword arguments that describe it: input_ids, mm_token_type_ids, grids
    spans: (B, length) once the whole prompt is there; `notes` on images that touch
    images: how many images a row has at most
    tokens_before: (B,) tokens of earlier turns, padding not counted
    earlier: (B, begin) spans of earlier turns, with recall: then `spans` covers them too, and
        images are counted on
    plans: layer index -> what it kept, with the spans of the slots that it chose from
    """

    length: int
    source: Mapping[str, Any]
    config: Any
    vision_mask: Mask = None
    begin: int = 0
    spans: Tensor | None = None
    images: int = 0
    notes: tuple[str, ...] = ()
    prunes: bool = False  # whether there is anything to drop: vision tokens or padding
    tokens_before: Tensor | None = None
    earlier: Tensor | None = None
    static: bool = False  # lengths go to the device afterwards: every layer is compacted
    leaving: Leaving | None = None  # of a sequence method: what stays, once that is known
    waiting: dict[int, Any] = field(default_factory=dict)  # layers looked at and not planned yet
    plans: dict[int, tuple[KeepPlan, Tensor, Tensor]] = field(default_factory=dict)
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def once(self, key: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for all layers of a first prompt, which hold the same slots.

        Later, every layer has kept its own.
        """
        if self.begin:
            return make()
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found

    @property
    def end(self) -> int:
        return self.begin + self.length

    def locate(self, batch: int, attention_mask: Tensor | None) -> None:
        """Find the images, for a forward of `batch` rows (beams repeat the prompt's rows)."""
        self._made.clear()
        spans = self._given() if self.vision_mask is not None else self._found()
        if batch % len(spans):
            what = "the prompt has" if self.vision_mask is None else "vision_mask has"
            raise InputError(f"{what} {len(spans)} rows and the model sees {batch}")
        spans = spans.repeat_interleave(batch // len(spans), dim=0)
        self.tokens_before = torch.full((batch,), self.begin, device=spans.device)
        mask = attention_mask if attention_mask is not None else self.source.get("attention_mask")
        mask = _padding(mask, self.end)
        if mask is not None:
            mask = mask.to(spans.device).repeat_interleave(batch // len(mask), dim=0)
            new = mask[:, : self.end][:, -self.length :]
            spans = spans.masked_fill(new == 0, -1)
            if mask.shape[1] >= self.end:
                self.tokens_before = mask[:, : self.begin].sum(-1)
        self.spans = spans if self.earlier is None else self._whole(spans, mask)
        least, self.images = torch.stack(self.spans.aminmax()).tolist()
        self.prunes = self.static or least != 0 or self.images > 0

    def _whole(self, spans: Tensor, mask: Tensor | None) -> Tensor:
        """Spans (B, end) of the whole conversation, of which `spans` are the new ones."""
        assert self.earlier is not None
        earlier = self.earlier.to(spans.device)
        earlier = earlier.repeat_interleave(len(spans) // len(earlier), dim=0)
        if mask is not None and mask.shape[1] >= self.end:
            earlier = earlier.masked_fill(mask[:, : self.begin] == 0, -1)
        before = earlier.amax(-1, keepdim=True).clamp(min=0)
        self.tokens_before = torch.zeros_like(before[:, 0])
        return torch.cat([earlier, torch.where(spans > 0, spans + before, spans)], -1)

    @property
    def last_image(self) -> int:
        """Columns of the conversation up to this prompt's last vision token; 0 without any."""
        assert self.spans is not None
        columns = (self.spans > 0).any(0).nonzero()
        first = self.end - self.spans.shape[1]
        return first + int(columns[-1]) + 1 if len(columns) else 0

    def positions(self) -> Tensor:
        """Row-logical position of each column of `spans`: padding is not counted."""
        assert self.spans is not None and self.tokens_before is not None
        return (self.spans >= 0).cumsum(-1) - 1 + self.tokens_before[:, None]

    def _found(self) -> Tensor:
        spans, self.notes = find_spans(
            self.config,
            self._columns(self.source.get("input_ids")),
            None,
            self._columns(self.source.get("mm_token_type_ids")),
            processor_inputs(self.source),
        )
        return spans

    def _given(self) -> Tensor:
        return mask_columns(self.vision_mask, self.source.get("input_ids"), self.begin, self.length)

    def _columns(self, tensor: Tensor | None) -> Tensor | None:
        """This prompt's columns of a (B, N) tensor that may also hold earlier turns."""
        return None if tensor is None else tensor[:, -self.length :]


def _padding(mask: Any, end: int) -> Tensor | None:
    """(B, columns) 0 for padding, of a 2D mask or of the 4D masks that static caches get."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    row = mask[:, 0, -1, :end]  # what the last token of the prompt may see
    return row if row.dtype == torch.bool else row == 0


def slot_spans(turn: Turn, start: Tensor, end: int) -> Tensor:
    """Spans (B, end) of a layer's slots: earlier turns count as text, fillers as padding."""
    assert turn.spans is not None
    spans = turn.spans.to(start.device)
    held = torch.zeros(len(spans), end - spans.shape[1], dtype=spans.dtype, device=start.device)
    slots = torch.cat([held, spans], -1)
    return slots.masked_fill(torch.arange(end, device=start.device) < start[:, None], -1)


def slot_positions(turn: Turn, end: int) -> Tensor:
    """Row-logical position (B, end) of each slot of this turn; meaningless for earlier slots."""

    def padded() -> Tensor:
        positions = turn.positions()
        return torch.nn.functional.pad(positions, (end - positions.shape[1], 0))

    return turn.once(("positions", end), padded)


@dataclass(frozen=True)
class Asked:
    """Whose attention is scored in a layer, and over what.

    spans: (B, C) of the layer's slots
    slots: (B, W) of the row's last tokens, -1 where it has fewer, or where a query is not at hand
    place: (B, W) of their queries among those at hand
    visible: (B, W, C) bool, what each of them sees
    """

    spans: Tensor
    slots: Tensor
    place: Tensor
    visible: Tensor


def asked(turn: Turn, store: KVStore, queries: int, first: int, window: int) -> Asked:
    """The last `window` tokens of each row, of whose queries `queries` are at hand.

    first: column of the first of them
    """

    def made() -> Asked:
        spans = slot_spans(turn, store.start, store.end)
        slots = last_columns(spans, min(window, queries))
        place = slots + (store.logical - store.end) - first  # slots end where columns end
        slots = slots.masked_fill((place < 0) | (place >= queries), -1)
        every = torch.arange(store.end, device=spans.device)
        visible = (every <= slots[..., None]) & (spans >= 0)[:, None]
        return Asked(spans, slots, place.clamp(0, queries - 1), visible)

    return turn.once(("asked", store.end, queries, first, window, store.start.device), made)


def last_columns(spans: Tensor, count: int) -> Tensor:
    """(B, count) int64: the slots of each row's last tokens, ascending, -1 where it has fewer.

    spans (B, N), -1 for padding.
    """
    slots = torch.arange(spans.shape[1], device=spans.device)
    found = torch.where(spans >= 0, slots, -1).topk(min(count, spans.shape[1]), sorted=True)
    return found.values.flip(-1)
