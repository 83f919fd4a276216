"""What is known of a prompt when its last token is computed, and the numbers of its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from plphp.policy import CachePolicy

Runs = Sequence[tuple[int, int, int]]  # (image, first, last): images from 1, `last` inclusive


@dataclass(frozen=True)
class Choice:
    """The numbers of a prompt's plans. An engine stores them, in case of a preemption.

    freed: per cache group, number of leading blocks that hold no tokens any more
    kept: per layer, number of vision tokens that each KV head keeps
    rates, classes: per layer, as in `plphp.policy.KeepPlan`
    """

    freed: tuple[int, ...]
    kept: tuple[int, ...]
    rates: tuple[float, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class PromptEnd:
    """A prompt whose last token is computed in this step, so that it can be pruned.

    start, end: number of computed tokens of the request before and after this step
    length: number of tokens of the prompt, start < length <= end
    images: (image, first, last) runs of vision tokens, images counted from 1, `last` inclusive
    policy: of this request
    fresh: per cache group, ids of the blocks that replace the last full blocks of the prompt; None
        to prune in place
    choice: the numbers from before the request was preempted, or None
    """

    start: int
    end: int
    length: int
    images: tuple[tuple[int, int, int], ...]
    policy: CachePolicy
    fresh: tuple[tuple[int, ...], ...] | None
    choice: Choice | None

    @property
    def text(self) -> int:
        """The number of tokens of the prompt that are not vision tokens."""
        return self.length - sum(last - first + 1 for _, first, last in self.images)


def spans_of(images: Runs, length: int) -> torch.Tensor:
    """The spans (N,) int64 of a prompt, as in `plphp.policy.LayerView`. length: N."""
    spans = torch.zeros(length, dtype=torch.int64)
    for image, first, last in images:
        spans[first : last + 1] = image
    return spans
