"""Runs the oracle along an answer, given the report of what was kept, read or rounded."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

import oracle

LOGITS = 1e-4
ROUGH = 50 * LOGITS  # A key that differs by 1e-7 in the oracle may be rounded to the next code.


def kept_of(report: Any) -> list[Tensor]:
    return [layer.kept for layer in report.layers]


def dropped(report: Any, spans: Tensor) -> oracle.Dropped:
    """The tokens that an answer did not attend to, from its report.

    spans: (B, columns up to the answer)
    """
    kept, recall, codes = kept_of(report), report.recall, report.codes
    if codes is not None:
        layers = zip(kept, report.layers, strict=True)
        rounded = [layer if its.pruned else layer[:, :0] for layer, its in layers]
        return oracle.Dropped(spans.shape[1], spans, rounded, kept_bits=codes.bits, text=codes.text)
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
    """The logits (B, steps, V) of the oracle along the answer of a report."""
    without = [*earlier, dropped(report, spans)]
    return oracle.decode(model, inputs, without, tokens.shape[1], tokens)[1]


def in_codes(report: Any) -> bool:
    if report.codes is not None:
        return True
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
    """Every token has the highest logit of the oracle (B, steps, V), or one equal to it."""
    worse = expected.amax(-1) - expected.gather(-1, tokens[..., None])[..., 0]
    assert worse.max() <= (20 * ROUGH if in_codes(report) else 0)


def alike(report: Any, row: int, alone: Any, steps: int) -> int:
    """The number of first steps in which a row of a batch and the row alone read the same tokens.

    Tokens with equal scores in the index may be fetched in any order.
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
