"""The oracle along an answer, once a report has said what was kept, read or rounded."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import oracle

LOGITS = 1e-4
ROUGH = 50 * LOGITS  # a key that the oracle has 1e-7 elsewhere may be rounded to the next code


def kept_of(report: Any) -> list[Tensor]:
    return [layer.kept for layer in report.layers]


def dropped(report: Any, spans: Tensor) -> oracle.Dropped:
    """What a report says that its answer did without. spans: (B, columns up to the answer)."""
    kept, recall = kept_of(report), report.recall
    if recall is None:
        return oracle.Dropped(spans.shape[1], spans, kept)
    if recall.home == "host":
        return oracle.Dropped(spans.shape[1], spans, kept, read=recall.read)
    return oracle.Dropped(spans.shape[1], spans, kept, bits=int(recall.home.removeprefix("int")))


def led(
    model: Any,
    inputs: dict[str, Tensor],
    spans: Tensor,
    report: Any,
    tokens: Tensor,
    earlier: Sequence[oracle.Dropped] = (),
) -> Tensor:
    """The oracle's logits (B, steps, V) along the answer that a report belongs to."""
    without = [*earlier, dropped(report, spans)]
    return oracle.decode(model, inputs, without, tokens.shape[1], tokens)[1]


def in_codes(report: Any) -> bool:
    return report.recall is not None and report.recall.home != "host"


def check_logits(logits: Tensor, expected: Tensor, report: Any, *, again: bool = False) -> None:
    """again: codes were made of what was in codes, and may lie just between two of the new ones."""
    off = (logits - expected).abs()
    if in_codes(report):
        near, most = (ROUGH, 10 * ROUGH) if again else (LOGITS, ROUGH)
        assert off.median() < near and off.max() < most
    else:
        assert off.max() < LOGITS


def check_greedy(tokens: Tensor, expected: Tensor, report: Any) -> None:
    """The best ones by the oracle's logits (B, steps, V), or of the same worth."""
    worse = expected.amax(-1) - expected.gather(-1, tokens[..., None])[..., 0]
    assert worse.max() <= (20 * ROUGH if in_codes(report) else 0)


def alike(report: Any, row: int, alone: Any, steps: int) -> int:
    """How many of the first steps of a row and of the row alone follow from the same reads.

    Tokens of equal worth, of the same codes in the index, are fetched in whichever order.
    """
    if report.recall is None or not report.recall.read:
        return steps

    def read(report: Any, row: int, step: int) -> list[set[int]]:
        layers = [layer[step][row] for layer in report.recall.read if layer]
        return [set(head.tolist()) - {-1} for layer in layers for head in layer]

    if alone.recall is None:  # a row without images
        return steps
    same = (read(report, row, step) == read(alone, 0, step) for step in range(steps - 1))
    return 1 + next((step for step, equal in enumerate(same) if not equal), steps - 1)
