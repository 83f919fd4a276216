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


def crowded(report: Any, row: int, probabilities: Sequence[Tensor]) -> bool:
    """Whether a row's KV heads fetch fewer tokens than query heads share them: each has a favourite
    of equal worth, and it is left open which of them find room.

    probabilities: [B, H, N] a layer, of the prompt's last token
    """
    if report.recall is None or in_codes(report) or not report.images[row]:
        return False
    attending = [
        (kept, p.shape[1])
        for kept, p in zip(kept_of(report), probabilities, strict=True)
        if p.numel() and kept.numel()
    ]
    return any((kept[row] >= 0).sum(-1).min() * kept.shape[1] < heads for kept, heads in attending)
