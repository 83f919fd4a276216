"""What a prefill kept and what it takes, as numbers. Holds no cache tensor alive."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from plphp.cache.earlier import EarlierImage
from plphp.cache.traffic import RecallReport
from plphp.policy import LAYER_CLASSES, KeepPlan


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer; every field but `layer` and `pruned` has one entry per batch row.

    layer: its index in the decoder, from 0
    gamma: vision attention, 0 to 1 (PLPHP, section 3), NaN where a row has no vision tokens
    layer_class: "vision-attentive", "vision-balanced", "vision-indifferent", or None
    rate: the retention rate asked for, NaN where a row has no vision tokens
    kept: (B, Hkv, K) int64 on the CPU, row-logical positions of kept vision tokens, -1 pads
    vision: (B,) vision tokens of the prompt
    pruned: False for a layer that was left alone; `Report.notes` says why
    kv_bytes, kv_bytes_full: as in `Report`, of this layer
    """

    layer: int
    gamma: tuple[float, ...]
    layer_class: tuple[str | None, ...]
    rate: tuple[float, ...]
    kept: Tensor
    vision: tuple[int, ...]
    pruned: bool = True
    kv_bytes: int = 0
    kv_bytes_full: int = 0

    @property
    def retention(self) -> float:
        """Kept vision entries over all vision entries of this layer; 1 without vision tokens."""
        return _ratio(int((self.kept >= 0).sum()), sum(self.vision) * self.kept.shape[1])


@dataclass(frozen=True)
class Seen:
    """Which tokens of a prompt are vision, for drawing them.

    What only drawing asks for stays on the device where it came.

    spans: (B, N) int64 on the CPU, as `vision_spans` returns them
    positions: (B, N) int64 on the CPU, row-logical position of each column
    config: the model's; inputs: what its processor said of the images, pixels left out
    ids: (B, N) int64, None for a prompt that came as embeddings
    """

    spans: Tensor
    positions: Tensor
    config: Any
    inputs: Mapping[str, Any]
    ids: Tensor | None = None


@dataclass(frozen=True)
class Report:
    """The last finished prefill.

    layers: one entry a decoder layer, in their order
    kv_bytes: bytes allocated for the cache after the prefill, slack and fillers included
    kv_bytes_full: bytes that transformers' own cache takes for the unpruned prompt, padding
        included: of a sliding layer its window, of a linear one its states
    prompt: (B,) prompt tokens of each row, padding not counted
    images: (B,) images and videos of each row
    notes: what a reader should know: layers left alone, images that could not be told apart
    seen: where the images stand in the prompt
    recall: what was parked where, None where dropped tokens are gone
    earlier: images of earlier turns, and what of them this prompt found
    """

    layers: tuple[LayerReport, ...]
    kv_bytes: int
    kv_bytes_full: int
    prompt: tuple[int, ...]
    images: tuple[int, ...]
    notes: tuple[str, ...] = ()
    seen: Seen | None = field(default=None, repr=False, compare=False)
    recall: RecallReport | None = None
    earlier: tuple[EarlierImage, ...] = ()

    @property
    def retention(self) -> float:
        """Kept vision K/V entries over all, over layers, 0 to 1; 1 without vision tokens."""
        kept = sum(int((layer.kept >= 0).sum()) for layer in self.layers)
        return _ratio(kept, sum(sum(a.vision) * a.kept.shape[1] for a in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON; NaN becomes None.

        `kept` becomes `kept_per_head`, how many vision tokens each KV head of a row kept.
        """
        return {
            "retention": self.retention,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "prompt": list(self.prompt),
            "images": list(self.images),
            "notes": list(self.notes),
            "recall": None if self.recall is None else self.recall.to_dict(),
            "earlier": [asdict(image) for image in self.earlier],
            "layers": [
                {
                    "layer": a.layer,
                    "gamma": [_number(g) for g in a.gamma],
                    "layer_class": list(a.layer_class),
                    "rate": [_number(r) for r in a.rate],
                    "vision": list(a.vision),
                    "kept_per_head": [int((row >= 0).sum()) // max(len(row), 1) for row in a.kept],
                    "retention": a.retention,
                    "pruned": a.pruned,
                    "kv_bytes": a.kv_bytes,
                    "kv_bytes_full": a.kv_bytes_full,
                }
                for a in self.layers
            ],
        }

    def plot(self, images: Sequence[Any] = (), *, layer: int | None = None, row: int = 0) -> Any:
        """A matplotlib figure: vision attention, rates, and what a layer kept of each image.

        images: the row's images and videos in prompt order: PIL images, files, or lists of frames
        layer: which to draw over the images, by default the one that keeps fewest
        Raises InputError where matplotlib is missing, or images do not fit the report.
        """
        return _drawing().plot(self, images, layer=layer, row=row)

    def to_html(
        self,
        path: str | os.PathLike[str],
        images: Sequence[Any] = (),
        *,
        prompt: str = "",
        answer: str = "",
        processor: Any = None,
        row: int = 0,
    ) -> None:
        """Write the inspector's page of one row: a single file that needs no network.

        images: as for `plot`; prompt, answer: shown as they are
        processor: the model's image processor, where it may crop other than its family does
        Raises InputError where jinja2 is missing, or images do not fit the report.
        """
        page = _drawing().page_of_report(self, images, prompt, answer, processor, row)
        _drawing().write_html(page, path)

    def _repr_html_(self) -> str | None:
        """The page in a notebook; plain text where jinja2 is missing."""
        shown: str | None = _drawing().notebook(self)
        return shown

    def __str__(self) -> str:
        rows = ["layer  gamma  class                rate  kept"]
        for a in self.layers:
            for row, gamma in enumerate(a.gamma):
                name = a.layer_class[row] or ("-" if a.pruned else "left alone")
                name = name if a.vision[row] else "no vision tokens"
                kept = int((a.kept[row] >= 0).sum()) // max(a.kept.shape[1], 1)
                rows.append(
                    f"{a.layer:5d}  {gamma:5.3f}  {name:19s}  {a.rate[row]:4.2f}  "
                    f"{kept}/{a.vision[row]}"
                )
        return "\n".join([*rows, self.summary, *self.remarks])

    @property
    def summary(self) -> str:
        """One line: what was kept, and bytes."""
        return (
            f"{self.retention:.1%} of vision K/V kept; cache {self.kv_bytes:,} bytes allocated, "
            f"{self.kv_bytes_full:,} for the full prompt"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines that go with it: recall, and the notes."""
        return (*([] if self.recall is None else [str(self.recall)]), *self.notes)


def _drawing() -> Any:
    """The room that draws reports: it stands above this one, so it is looked up when asked for."""
    return import_module("plphp.report")


def layer_report(layer: int, plan: KeepPlan, spans: Tensor, positions: Tensor) -> LayerReport:
    """Read a plan against the slots (B, C) that it chose from: their spans and positions."""
    spans, positions, columns = spans.cpu(), positions.cpu(), plan.columns.cpu()
    used = torch.arange(columns.shape[-1]) >= columns.shape[-1] - plan.lengths.cpu()[:, None]
    rows = torch.arange(len(spans))[:, None, None]
    vision = used[:, None] & (spans[rows, columns] > 0)
    kept = positions[rows, columns].masked_fill(~vision, -1)
    return LayerReport(
        layer=layer,
        gamma=tuple(plan.gamma.tolist()),
        layer_class=tuple(LAYER_CLASSES[c] if c >= 0 else None for c in plan.classes.tolist()),
        rate=tuple(plan.rate.tolist()),
        kept=_close_ranks(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
    )


def untouched_report(layer: int, spans: Tensor, positions: Tensor, kv_heads: int) -> LayerReport:
    """A layer that was left alone, or a prompt without images: every vision token is kept."""
    spans, positions = spans.cpu(), positions.cpu()
    nothing = (float("nan"),) * len(spans)
    kept = positions.masked_fill(spans <= 0, -1)[:, None].expand(-1, kv_heads, -1)
    return LayerReport(
        layer=layer,
        gamma=nothing,
        layer_class=(None,) * len(spans),
        rate=nothing,
        kept=_close_ranks(kept),
        vision=tuple((spans > 0).sum(-1).tolist()),
        pruned=False,
    )


def _close_ranks(kept: Tensor) -> Tensor:
    """Move -1 to the right, positions still ascending, and cut what is -1 for every head."""
    order = (kept < 0).to(torch.uint8).argsort(dim=-1, stable=True)
    most = int((kept >= 0).sum(-1).max()) if kept.numel() else 0
    return kept.gather(-1, order)[..., :most].clone()


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _number(value: float) -> float | None:
    return None if value != value else value
