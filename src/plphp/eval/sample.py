"""What is asked: samples, and the tasks that draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One question about some pictures.

    id: unique in its task, the same for the same seed
    answers: what counts as right, the first of them the one that texts are compared with; empty
        for pictures without labels, which are scored by agreement with the unpruned model only
    earlier: a question that was answered before on the same pictures and the same cache, so that
        what is left of them was chosen for it
    """

    id: str
    images: tuple[Image, ...]
    question: str
    answers: tuple[str, ...] = ()
    earlier: str | None = None


@dataclass(frozen=True)
class Task:
    """A source of held-out samples.

    what: one line for people: what is asked, and what its score can and cannot show
    draw: (count, seed) -> samples; the first ones of a longer draw are those of a shorter one
    metric: its main one, a key of `metrics.TEXT_METRICS`; None for agreement only
    """

    name: str
    what: str
    draw: Callable[[int, int], list[Sample]]
    metric: str | None = "exact"
