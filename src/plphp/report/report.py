"""`Report`: what a prefill kept and the bytes it takes. No cache tensor stays allocated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from torch import Tensor

from plphp._drawing import drawing
from plphp.report.earlier_images import EarlierImage
from plphp.report.layers import LayerReport, Seen, StageReport, ratio
from plphp.report.table import above_full, table
from plphp.report.traffic import CodesReport, RecallReport

NOTHING = "no vision token was kept: nothing after the prompt can read the images"


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """What a finished prefill kept, and the bytes that the cache takes.

    Two reports are equal only if they are the same object, since they hold tensors. To compare
    them, compare what `to_dict` returns.

    layers: one entry for each decoder layer, in order
    kv_bytes: bytes allocated for the cache after the prefill, slack and fillers included
    kv_bytes_full: bytes that transformers' own cache takes for the unpruned prompt, padding
        included: of a sliding layer its window, of a linear one its states
    prompt: number of prompt tokens in each row, padding not counted
    images: number of images and videos in each row
    notes: remarks, such as on layers left alone or images that could not be told apart
    seen: where the images are in the prompt
    recall: where the vision tokens are, None without recall
    earlier: images of earlier turns, with the share of each that this prompt found
    codes: the bytes of vision tokens where kept tokens are in codes, None without `kv_bits`
    stages: what each stage left, where a sequence method dropped hidden states; else empty
    undefined: the layers whose attention is not a number, so that the answer cannot be trusted
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
    stages: tuple[StageReport, ...] = ()
    codes: CodesReport | None = None
    undefined: tuple[int, ...] = ()

    @property
    def retention(self) -> float:
        """The share of vision K/V that all layers kept, 0 to 1; 1 without vision tokens."""
        kept = sum(int((layer.kept >= 0).sum()) for layer in self.layers)
        every = sum(sum(layer.vision) * layer.kept.shape[1] for layer in self.layers)
        return ratio(kept, every)

    def entered(self, layer: int) -> Tensor | None:
        """The vision tokens that entered a layer, (B, K) int64 row-logical positions.

        Ascending, filled up with -1 on the right. None if no stage had dropped any before.
        """
        for stage in self.stages:
            if stage.stays is not None and stage.layer is not None and stage.layer <= layer:
                return stage.stays
        return None

    @property
    def on_device(self) -> float:
        """The share of the bytes of vision K/V on the device: what was kept, or what recall takes.

        0 to 1; 1 without vision tokens. With kept codes it counts the bytes of the codes.
        """
        if self.codes is not None:
            return self.codes.share
        return self.retention if self.recall is None else self.recall.share

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, lists and strings, ready for JSON. NaN becomes None.

        `kept` becomes `kept_per_head`: the number of vision tokens that each KV head of a row kept.
        """
        return {
            "retention": self.retention,
            "kv_bytes": self.kv_bytes,
            "kv_bytes_full": self.kv_bytes_full,
            "prompt": list(self.prompt),
            "images": list(self.images),
            "notes": list(self.notes),
            "recall": None if self.recall is None else self.recall.to_dict(),
            "codes": None if self.codes is None else self.codes.to_dict(),
            "earlier": [asdict(image) for image in self.earlier],
            "stages": [stage.to_dict() for stage in self.stages],
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
        """Draw vision attention, rates, and what a layer kept of each image.

        images: the row's images and videos in prompt order: PIL images, files, or lists of frames
        layer: the layer to draw over the images, by default the one that keeps the fewest tokens
        row: row of the batch
        Returns a matplotlib figure. Raises InputError if matplotlib is missing, or the images do
        not fit the report.
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
        """Write the inspector's page of one row: a single HTML file that needs no network.

        images: as for `plot`
        prompt, answer: text that the page shows
        processor: the model's image processor, needed if it crops images in its own way
        Raises InputError if jinja2 is missing, or the images do not fit the report.
        """
        _drawing().write_report(
            self, path, images, prompt=prompt, answer=answer, processor=processor, row=row
        )

    def _repr_html_(self) -> str | None:
        """The page in a notebook; None, so that plain text is shown, if jinja2 is missing."""
        return _drawing().notebook(self)

    @property
    def has_vision(self) -> bool:
        """Whether a row has vision tokens: of this prompt, or with recall of any turn."""
        return any(sum(layer.vision) for layer in self.layers)

    def __repr__(self) -> str:
        return f"<Report: {self.summary}>"

    def __str__(self) -> str:
        if not self.has_vision:
            return "\n".join([self.summary, *self.remarks])
        return "\n".join([*table(self), self.summary, *self.remarks])

    @property
    def summary(self) -> str:
        """One line: the share that was kept, or with recall where the tokens are, and the bytes.

        The bytes alone for a prompt without vision tokens; one of the notes says that it has none.
        """
        taken = (
            f"cache {self.kv_bytes:,} bytes allocated, {self.kv_bytes_full:,} for the full prompt"
        )
        if not self.has_vision:
            return taken
        share = f"{self.retention:.1%} of vision K/V kept"
        if self.recall is not None:
            lost = "nothing was dropped" if not self.stages else "nothing was dropped by the cache"
            share = f"{lost}: {self.recall.whereabouts}"
        return f"{share}; {taken}"

    @property
    def remarks(self) -> tuple[str, ...]:
        """The lines after the summary: stages, bytes of recall or codes, slack, the notes.

        Only slack and notes for a prompt without vision tokens.
        """
        shares = [*self.stages, self.recall, self.codes] if self.has_vision else []
        told = (str(one) for one in shares if one is not None)
        nothing = [NOTHING] if self.has_vision and not self.retention and not self.recall else []
        return (*told, *nothing, *above_full(self), *self.notes)


def _number(value: float) -> float | None:
    """A number for JSON: None for NaN."""
    return None if value != value else value


class Drawing(Protocol):
    """The functions that draw a report, for `plot`, `to_html` and the display in a notebook."""

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
        """HTML for a notebook, None if it cannot be made."""


def _drawing() -> Drawing:
    """The functions that draw reports, imported when a report is drawn."""
    functions: Drawing = drawing()
    return functions
