"""What a prefill kept and what it takes, as numbers. Holds no cache tensor alive."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from plphp._drawing import drawing
from plphp.report.earlier_images import EarlierImage
from plphp.report.layers import LayerReport, Seen, ratio
from plphp.report.traffic import RecallReport


@dataclass(frozen=True, eq=False)
class Report:
    """The last finished prefill.

    Reports hold tensors: two are equal if they are one object; compare what `to_dict` returns.

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
        return ratio(kept, sum(sum(a.vision) * a.kept.shape[1] for a in self.layers))

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
        _drawing().write_report(
            self, path, images, prompt=prompt, answer=answer, processor=processor, row=row
        )

    def _repr_html_(self) -> str | None:
        """The page in a notebook; plain text where jinja2 is missing."""
        return _drawing().notebook(self)

    def __str__(self) -> str:
        held = "kept" if self.recall is None else "in full on the device"
        rows = [f"layer  gamma  class                rate  {held}"]
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
        """One line: what was kept, or what is where with recall, and bytes."""
        share = f"{self.retention:.1%} of vision K/V kept"
        if self.recall is not None:
            share = f"nothing was dropped: {self.recall.whereabouts}"
        return (
            f"{share}; cache {self.kv_bytes:,} bytes allocated, "
            f"{self.kv_bytes_full:,} for the full prompt"
        )

    @property
    def remarks(self) -> tuple[str, ...]:
        """Lines that go with it: recall, and the notes."""
        return (*([] if self.recall is None else [str(self.recall)]), *self.notes)


def _number(value: float) -> float | None:
    return None if value != value else value


class Drawing(Protocol):
    """What draws a report: `plot`, `to_html` and the display in a notebook call it."""

    def plot(self, report: Report, images: Sequence[Any], *, layer: int | None, row: int) -> Any:
        """A matplotlib figure, as `Report.plot` describes it."""

    def write_report(
        self,
        report: Report,
        path: str | os.PathLike[str],
        images: Sequence[Any],
        *,
        prompt: str,
        answer: str,
        processor: Any,
        row: int,
    ) -> None:
        """Write a page, as `Report.to_html` describes it."""

    def notebook(self, report: Report) -> str | None:
        """HTML for a notebook, None where it cannot be made."""


def _drawing() -> Drawing:
    found: Drawing = drawing()
    return found
