"""One prompt: its columns, where its images are, and the state while the model reads it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.hf.located import Located
from plphp.hf.remaining_tokens import Part, RemainingTokens
from plphp.hf.vision_mask import Mask, mask_columns
from plphp.models import find_spans, processor_inputs
from plphp.policy import KeepPlan
from plphp.policy.view import pack

Result = TypeVar("Result")


@dataclass(frozen=True)
class Prompt:
    """What is known of a prompt before the model reads it.

    begin, length: the prompt is the columns [begin, begin + length) of its conversation
    source: the keyword arguments that describe it: input_ids, mm_token_type_ids, image grids
    config: the configuration of the whole model
    vision_mask: as given to `plphp.prune`
    earlier: (B, begin) int64 spans of the earlier turns, only with recall: recall selects among
        the images of the whole conversation
    compacts_all: whether every layer has to be compacted, even if nothing is dropped
    """

    begin: int
    length: int
    source: Mapping[str, Any]
    config: Any
    vision_mask: Mask = None
    earlier: Tensor | None = None
    compacts_all: bool = False

    @property
    def end(self) -> int:
        """The column after the prompt's last one."""
        return self.begin + self.length


@dataclass
class Prefill:
    """The state of one prompt while the model reads it.

    located: set by the forward that brings the prompt's last column, or before the first one where
        a sequence method plans ahead
    plans_now: whether the forwards that run are there to plan ahead
    pieces: the hidden states (B, T, E) of the chunks that are there to plan, before layer K
    ahead: whether a sequence method has planned ahead, so that the prompt may come in chunks
    planned: the tokens that stay by that plan, None for all
    forward: the forward that runs: its first column, counted from the prompt's, and its number of
        columns
    remaining: the tokens that a sequence method leaves in the hidden states; None in layers before
        the one where they leave
    key_sizes: as in `HiddenView`, once the layer before a method that reads them has run
    here: the columns in the slots of the layer that runs now, where they are neither all columns
        nor those of `remaining`
    waiting: layers that were scored and wait for the plan of all layers, by their index
    plans: layer index -> its plan, the columns int32 or int64, and the spans and positions
        (B, slots) that it chose from
    undefined: layer index -> () bool on the layer's device, whether its attention is not a number
    """

    prompt: Prompt
    located: Located | None = None
    plans_now: bool = False
    pieces: list[Tensor] = field(default_factory=list)
    ahead: bool = False
    planned: RemainingTokens | None = None
    forward: tuple[int, int] = (0, 0)
    remaining: RemainingTokens | None = None
    key_sizes: Tensor | None = None
    here: Located | None = None
    waiting: dict[int, Any] = field(default_factory=dict)
    plans: dict[int, tuple[KeepPlan, Tensor, Tensor]] = field(default_factory=dict)
    undefined: dict[int, Tensor] = field(default_factory=dict)
    _results: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def where(self) -> Located:
        """Where the images are. Only available once they are `located`."""
        assert self.located is not None, "the prompt has not been read to its end"
        return self.located

    @property
    def part(self) -> Part | None:
        """What stays of the forward that runs, None if all of it does."""
        return None if self.remaining is None else self.remaining.part(*self.forward)

    @property
    def entered(self) -> Located:
        """The columns that entered the layer that runs now: all, or those that a stage left."""
        if self.here is not None:
            return self.here
        return self.where if self.remaining is None else self.remaining.where

    @property
    def reads_last(self) -> bool:
        """Whether the forward that runs brings the prompt's last column."""
        return sum(self.forward) >= self.prompt.length

    def begin_forward(self, past: int, columns: int) -> None:
        """Note that a forward of `columns` columns begins, after `past` ones in the cache."""
        self.forward, self.remaining = (past - self.prompt.begin, columns), None

    def leave(self, plan: KeepPlan, flash: bool) -> None:
        """From the next layer on, only the columns of a plan (for one KV head) are computed.

        The last token of each row stays whatever the plan says: the answer is predicted from it.

        flash: as in `RemainingTokens`
        """
        columns = slice(-self.prompt.length, None)
        spans, places = self.where.spans[:, columns], self.where.positions()[:, columns]
        whole = replace(self.where, spans=spans, places=places)
        plan = with_last(plan, spans.to(plan.columns.device))
        self.remaining = RemainingTokens(plan, whole.only(plan), self.prompt.length, flash)

    def note(self, layer: int, plan: KeepPlan, spans: Tensor, positions: Tensor) -> None:
        """Note for the report what a layer keeps.

        spans, positions: (B, slots) int64 of the slots that the plan has chosen from

        The notes of all layers wait for the last one, beside a layer in full, hence 32 bits.
        """
        self.plans[layer] = (replace(plan, columns=plan.columns.int()), spans, positions)

    def check(self, layer: int, numbers: Tensor) -> None:
        """Note whether some numbers from a layer's attention are NaN. Only the report reads it."""
        self.undefined[layer] = numbers.isnan().any()

    def locate(self, batch: int, attention_mask: Tensor | None) -> None:
        """Find the images, for a forward of `batch` rows: beams repeat the prompt's rows.

        attention_mask: that of the forward, None if the prompt has its own or none
        """
        self._results.clear()
        self.located = locate(self.prompt, batch, attention_mask)

    def once(self, key: tuple[Any, ...], compute: Callable[[], Result]) -> Result:
        """The result of `compute`, called once for all layers of a first prompt.

        key: names the result; layers with equal keys share it

        The layers of a first prompt hold the same columns, so the result is the same in all of
        them. In later turns each layer holds other columns, and `compute` is called in each.
        """
        if self.prompt.begin:
            return compute()
        key = (self.remaining is None, *key)
        if key not in self._results:
            self._results[key] = compute()
        result: Result = self._results[key]
        return result


def with_last(plan: KeepPlan, spans: Tensor) -> KeepPlan:
    """A plan for one KV head that also keeps the last token of each row.

    spans: (B, N) int64 of the columns that the plan has chosen from. The host waits for the device.
    """
    columns = torch.arange(spans.shape[1], device=spans.device)
    last = torch.where(spans >= 0, columns, -1).amax(-1, keepdim=True)
    stays = ((plan.columns[:, 0] == last) & plan.valid).any(-1) | (last[:, 0] < 0)
    if bool(stays.all()):
        return plan
    keep = torch.zeros_like(spans, dtype=torch.bool).scatter_(1, plan.columns[:, 0], plan.valid)
    keep |= columns == last
    return pack(keep[:, None], plan.gamma, plan.rate, plan.classes)


def locate(prompt: Prompt, batch: int, attention_mask: Tensor | None) -> Located:
    """Find the images of a prompt, for a forward of `batch` rows.

    Raises InputError if the rows of the prompt or of `vision_mask` cannot be repeated to `batch`.
    """
    spans, notes = _spans(prompt)
    if batch % len(spans):
        what = "the prompt" if prompt.vision_mask is None else "vision_mask"
        raise InputError(f"{what} has {len(spans)} rows and the model sees {batch}")
    spans = spans.repeat_interleave(batch // len(spans), dim=0)
    before = torch.full((batch,), prompt.begin, device=spans.device)
    mask = attention_mask if attention_mask is not None else prompt.source.get("attention_mask")
    mask = _padding(mask, prompt.end)
    if mask is not None:
        mask = mask.to(spans.device).repeat_interleave(batch // len(mask), dim=0)
        new = mask[:, : prompt.end][:, -prompt.length :]
        spans = spans.masked_fill(new == 0, -1)
        if mask.shape[1] >= prompt.end:
            before = mask[:, : prompt.begin].sum(-1)
    if prompt.earlier is not None:
        spans, before = _with_earlier(prompt, spans, mask), torch.zeros_like(before)
    lowest, images = torch.stack(spans.aminmax()).tolist()
    prunes = prompt.compacts_all or lowest != 0 or images > 0
    return Located(spans, prompt.end, before, images, prunes, notes)


def _with_earlier(prompt: Prompt, spans: Tensor, mask: Tensor | None) -> Tensor:
    """Spans (B, end) of the whole conversation, images numbered on from those of earlier turns.

    spans: (B, length) of the prompt, images numbered from 1
    mask: (B, columns), 0 for padding
    """
    assert prompt.earlier is not None
    earlier = prompt.earlier.to(spans.device)
    earlier = earlier.repeat_interleave(len(spans) // len(earlier), dim=0)
    if mask is not None and mask.shape[1] >= prompt.end:
        earlier = earlier.masked_fill(mask[:, : prompt.begin] == 0, -1)
    before = earlier.amax(-1, keepdim=True).clamp(min=0)
    return torch.cat([earlier, torch.where(spans > 0, spans + before, spans)], -1)


def _spans(prompt: Prompt) -> tuple[Tensor, tuple[str, ...]]:
    """Spans (B, length) of the prompt, and remarks on them.

    They come from the caller's `vision_mask` if there is one, else from the model's inputs.
    """
    if prompt.vision_mask is not None:
        ids = prompt.source.get("input_ids")
        return mask_columns(prompt.vision_mask, ids, prompt.begin, prompt.length), ()
    return find_spans(
        prompt.config,
        _columns(prompt, "input_ids"),
        None,
        _columns(prompt, "mm_token_type_ids"),
        processor_inputs(prompt.source),
    )


def _columns(prompt: Prompt, name: str) -> Tensor | None:
    """The prompt's columns of an input (B, N) that may also hold the earlier turns."""
    tensor = prompt.source.get(name)
    return None if tensor is None else tensor[:, -prompt.length :]


def _padding(mask: Any, end: int) -> Tensor | None:
    """(B, columns), 0 for padding, from a 2D mask or from the 4D masks of static caches.

    end: the column after the prompt's last one
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask
    row = mask[:, 0, -1, :end]  # what the last prompt token may attend to
    return row if row.dtype == torch.bool else row == 0
