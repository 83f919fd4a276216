"""The text of a report: its table of layers, and the line on bytes above the full prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from plphp.report.layers import LayerReport, Seen, StageReport
    from plphp.report.traffic import RecallReport

SLOTS = "{:,} bytes above the full prompt: slots for the next tokens, and numbers about the slots"
NUMBERS = "{:,} bytes above the full prompt: numbers about the slots"


class Told(Protocol):
    """What these functions read of a `Report`, which imports them."""

    @property
    def layers(self) -> Sequence[LayerReport]: ...
    @property
    def stages(self) -> Sequence[StageReport]: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def recall(self) -> RecallReport | None: ...
    @property
    def seen(self) -> Seen | None: ...
    @property
    def kv_bytes(self) -> int: ...
    @property
    def kv_bytes_full(self) -> int: ...
    def entered(self, layer: int) -> Tensor | None: ...


def table(report: Told) -> list[str]:
    """A heading and a line for each row of each layer.

    The number of the row is shown where there are several. Where a sequence method dropped tokens,
    what the heads kept is counted of the tokens that entered the layer, as the rate is.
    """
    several = len(report.prompt) > 1
    kept = "kept" if report.recall is None else "in full on the device"
    if report.stages:
        kept += " / entered, of all vision tokens"
    row = "  row" if several else ""
    lines = [f"layer{row}  gamma  class                rate  {kept}"]
    for layer in report.layers:
        for index, gamma in enumerate(layer.gamma):
            row = f"  {index:3d}" if several else ""
            lines.append(
                f"{layer.layer:5d}{row}  {gamma:5.3f}  {_class(report, layer, index):19s}  "
                f"{layer.rate[index]:4.2f}  {_kept(report, layer, index)}"
            )
    return lines


def _class(report: Told, layer: LayerReport, row: int) -> str:
    """The class of a layer, or why it has none. With recall the class decides nothing."""
    if not layer.vision[row]:
        return "no vision tokens"
    if not layer.pruned:
        return "left alone"
    return layer.layer_class[row] or "-" if report.recall is None else "-"


def _kept(report: Told, layer: LayerReport, row: int) -> str:
    """How many vision tokens a head kept, and of how many."""
    kept = int((layer.kept[row] >= 0).sum()) // max(layer.kept.shape[1], 1)
    entered, every = report.entered(layer.layer), layer.vision[row]
    count = every if entered is None else int((entered[row] >= 0).sum())
    return f"{kept}/{count}" + (f" of {every}" if report.stages else "")


def above_full(report: Told) -> list[str]:
    """A line on the bytes that a cache takes above those of the full prompt; none if it takes less.

    With recall there is no such line, since the bytes of recall are told apart in another.
    """
    more = report.kv_bytes - report.kv_bytes_full
    if more <= 0 or report.recall is not None:
        return []
    return [(SLOTS if _has_slots(report) else NUMBERS).format(more)]


def _has_slots(report: Told) -> bool:
    """Whether the bytes above the full prompt hold a slot of any layer.

    The numbers about the slots take a few bytes a row, and a slot those of a key and a value.
    """
    columns = 0 if report.seen is None else int(report.seen.positions.max()) + 1
    return columns == 0 or any(
        layer.kv_bytes - layer.kv_bytes_full >= layer.kv_bytes_full / columns > 0
        for layer in report.layers
    )
