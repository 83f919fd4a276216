"""Samples, and the tasks that draw them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL.Image import Image

from plphp.inputs import Clip


@dataclass(frozen=True)
class Sample:
    """One question about some images.

    id: unique in its task, and the same for the same seed
    images: images, and clips of frames in the place of images
    answers: the reference answers; empty for images without labels, for which agreement with the
        unpruned model is the score
    earlier: the question of a first turn on the same images and the same cache, for which their
        tokens were selected; None without a first turn
    """

    id: str
    images: tuple[Image | Clip, ...]
    question: str
    answers: tuple[str, ...] = ()
    earlier: str | None = None


def frames(shown: Image | Clip) -> Clip:
    """The frames of a clip; an image is the only frame of itself."""
    return shown if isinstance(shown, tuple) else (shown,)


@dataclass(frozen=True)
class Task:
    """A source of held-out samples.

    what: one line of description: the questions, and the limits of the score
    draw: function (count, seed) -> samples; a larger count adds samples at the end
    metric: the main metric, a key of `metrics.TEXT_METRICS`; None for agreement only
    """

    name: str
    what: str
    draw: Callable[[int, int], list[Sample]]
    metric: str | None = "exact"
