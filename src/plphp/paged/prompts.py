"""What is known of a prompt when its last token is computed, and the numbers of its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

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
class PromptPart:
    """The last prompt tokens that one step computes, of those whose queries a method reads.

    start, end: number of computed tokens of the request before and after this step
    length: number of tokens of the prompt
    first: the column of the first token whose query the method reads, in [0, length)
    """

    start: int
    end: int
    length: int
    first: int

    def join(self, before: Tensor | None, queries: Tensor) -> Tensor:
        """The queries (W, H, D) of the columns from `first` to the end of this step.

        before: (V, H, D), what the last step returned, or None. A request that was preempted
            computes columns again, which replaces them here
        queries: (end - start, H, D), of all tokens of this step
        """
        begin = max(self.start, self.first)
        new = queries[begin - self.start : self.length - self.start].clone()
        if begin == self.first:
            return new
        assert before is not None, "an earlier step has computed the columns before this one"
        return torch.cat([before[: begin - self.first], new])


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

    @property
    def part(self) -> PromptPart:
        """The part of the prompt that this step computes."""
        return PromptPart(self.start, self.end, self.length, first_asked(self.policy, self.length))


def first_asked(policy: CachePolicy, length: int) -> int:
    """The column of the first token whose query a policy reads, in a prompt of `length` tokens."""
    return max(length - policy.window, 0)


def spans_of(images: Runs, length: int) -> Tensor:
    """The spans (N,) int64 of a prompt, as in `plphp.policy.LayerView`. length: N."""
    spans = torch.zeros(length, dtype=torch.int64)
    for image, first, last in images:
        spans[first : last + 1] = image
    return spans
