"""Samples in batches of similar length, and batches as what a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from plphp.eval.sample import Sample
from plphp.inputs import Runnable
from plphp.models import vision_spans

MARGIN = 8  # tokens that an answer may be longer than the longest right one of its batch
TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Batch:
    """Rows that are generated together.

    inputs: what generate() takes for the questions, padded on the left
    first: the same for the earlier questions, whose cache the questions go on with; None without
    shared: columns that both prompts begin with, images included
    vision: (B,) vision tokens of each row
    limit: the most tokens of an answer
    """

    samples: tuple[Sample, ...]
    inputs: Mapping[str, Tensor]
    first: Mapping[str, Tensor] | None
    shared: int
    vision: tuple[int, ...]
    limit: int

    @property
    def columns(self) -> int:
        """Length of the prompt, padding included."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def prompt(self) -> Mapping[str, Tensor]:
        """What is read with the pictures: the earlier question where there is one."""
        return self.inputs if self.first is None else self.first

    def later(self) -> dict[str, Tensor]:
        """The questions as a later turn on a cache that has read the images."""
        return {name: self.inputs[name] for name in TEXT}


def in_batches(samples: Sequence[Sample], size: int, tokenizer: Any) -> list[list[Sample]]:
    """Samples of similar length together: padding costs as much as tokens do.

    Depends on nothing but the arguments, so that an interrupted run goes on with the same batches.
    """

    def kind(sample: Sample) -> int:
        # A later turn has no padding inside: questions of one batch are equally long.
        return len(tokenizer(sample.question)["input_ids"]) if sample.earlier else 0

    def length(sample: Sample) -> tuple[int, ...]:
        pixels = sum(image.width * image.height for image in sample.images)
        answer = max((len(answer) for answer in sample.answers), default=0)
        return kind(sample), pixels, len(sample.images), answer

    ordered = sorted(samples, key=lambda sample: (*length(sample), sample.id))
    groups = [list(group) for _, group in groupby(ordered, key=kind)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def make_batch(loaded: Runnable, samples: Sequence[Sample], longest: int) -> Batch:
    """Encode rows. longest: tokens of an answer, at most; right answers say where less will do."""
    inputs = loaded.batch([(s.images, s.question) for s in samples])
    first, shared = None, 0
    if samples[0].earlier is not None:
        first = loaded.batch([(s.images, s.earlier or "") for s in samples])
        shared = _shared(first, inputs)
    spans = vision_spans(loaded.model.config, **inputs)
    return Batch(
        samples=tuple(samples),
        inputs=inputs,
        first=first,
        shared=shared,
        vision=tuple((spans > 0).sum(-1).tolist()),
        limit=_limit(loaded.tokenizer, samples, longest),
    )


def answer_tokens(tokenizer: Any, answer: str) -> int:
    """Tokens of a text, those that every text begins with not counted."""
    return len(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _limit(tokenizer: Any, samples: Sequence[Sample], longest: int) -> int:
    known = [answer_tokens(tokenizer, answer) for s in samples for answer in s.answers]
    # What runs on past every right answer is wrong already.
    return min(longest, max(known) + MARGIN) if known else longest


def _shared(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> int:
    """Columns before the two prompts part; the same for all rows, padding included."""
    one, other = first["input_ids"], second["input_ids"]
    if one.shape[1] != other.shape[1]:
        # Both are padded to their longest row: what differs is the length of the questions.
        length = min(one.shape[1], other.shape[1])
        one, other = one[:, :length], other[:, :length]
    parted = (one != other).any(0).nonzero()
    return int(parted[0]) if len(parted) else one.shape[1]
