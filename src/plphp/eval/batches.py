"""Batches of samples of similar length, and the inputs of a model for a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from plphp.eval.sample import Sample, frames
from plphp.inputs import Runnable
from plphp.models import vision_spans

MARGIN = 8  # tokens that an answer may be longer than the longest reference answer of its batch
BLOCK = 6  # batches whose samples are sorted together
TEXT = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class Batch:
    """Samples whose answers are generated together.

    inputs: arguments of generate() for the questions, padded on the left
    first: arguments for the questions of the first turn, where the questions are a second turn on
        the same cache; else None
    shared: number of columns that the prompts of both turns have in common, images included
    vision: (B,) number of vision tokens of each row
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
        """The number of columns of the prompt, padding included."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def prompt(self) -> Mapping[str, Tensor]:
        """The arguments of the prompt with the images: the first turn's where there are two."""
        return self.inputs if self.first is None else self.first

    def later(self) -> dict[str, Tensor]:
        """The arguments of the second turn, on a cache that holds the images."""
        return {name: self.inputs[name] for name in TEXT}


def in_batches(samples: Sequence[Sample], size: int, tokenizer: Any) -> list[list[Sample]]:
    """Batches of up to `size` samples of similar length, because padding takes computing time.

    The result depends on the arguments only, so that an interrupted run continues with the same
    batches. Samples are sorted by length within blocks, so that the batches of earlier blocks stay
    the same when a run gets more samples.
    """
    block = BLOCK * size
    parts = [samples[i : i + block] for i in range(0, len(samples), block)]
    return [batch for part in parts for batch in _by_length(part, size, tokenizer)]


def _by_length(samples: Sequence[Sample], size: int, tokenizer: Any) -> list[list[Sample]]:

    def kind(sample: Sample) -> int:
        # A second turn has no padding of its own, so the questions of a batch have equal lengths.
        return len(tokenizer(sample.question)["input_ids"]) if sample.earlier else 0

    def length(sample: Sample) -> tuple[int, ...]:
        shown = [frame for image in sample.images for frame in frames(image)]
        pixels = sum(frame.width * frame.height for frame in shown)
        answer = max((len(answer) for answer in sample.answers), default=0)
        return kind(sample), pixels, len(sample.images), answer

    ordered = sorted(samples, key=lambda sample: (*length(sample), sample.id))
    groups = [list(group) for _, group in groupby(ordered, key=kind)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


def make_batch(loaded: Runnable, samples: Sequence[Sample], longest: int) -> Batch:
    """The batch of some samples.

    longest: the most tokens of an answer; fewer if the reference answers are shorter
    """
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
    """The number of tokens of a text, without special tokens at its beginning."""
    return len(tokenizer(answer, add_special_tokens=False)["input_ids"])


def _limit(tokenizer: Any, samples: Sequence[Sample], longest: int) -> int:
    known = [answer_tokens(tokenizer, answer) for s in samples for answer in s.answers]
    # An answer that is longer than every reference answer is wrong, so generation may stop.
    return min(longest, max(known) + MARGIN) if known else longest


def _shared(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> int:
    """The number of leading columns that are equal in both prompts, in all rows.

    Padding counts as a column.
    """
    one, other = first["input_ids"], second["input_ids"]
    if one.shape[1] != other.shape[1]:
        # Both prompts are padded to their longest row, so their questions differ in length.
        length = min(one.shape[1], other.shape[1])
        one, other = one[:, :length], other[:, :length]
    different = (one != other).any(0).nonzero()
    return int(different[0]) if len(different) else one.shape[1]
