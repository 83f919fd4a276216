"""The messages between the scheduler side and the worker sides, one per step in each direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from plphp.policy import PLPHP

T = TypeVar("T")
VISION = ("image", "video")  # modalities whose tokens are pruned


@dataclass(frozen=True)
class Choice:
    """The numbers of a prompt's plans. The scheduler stores them, in case of a preemption.

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
    policy: PLPHP
    fresh: tuple[tuple[int, ...], ...] | None
    choice: Choice | None


def in_use(fresh: Sequence[T], full: int, freed: int) -> Sequence[T]:
    """The reserved blocks of one group that the pruned prompt uses.

    fresh: the reserved blocks: objects in the scheduler, ids in the workers
    full: number of full blocks of the unpruned prompt
    freed: number of full blocks that the pruned prompt does not need
    """
    return fresh[len(fresh) - (full - freed) :] if 0 < freed < full else fresh[:0]


@dataclass
class Step(KVConnectorMetadata):
    """The message to the workers about one step.

    rows: maps the block that a request writes last, in group 0, to the request id. The workers
        find the row of each request in the batch with it
    ends: by request id, the prompts whose last token is computed in this step
    released: ids of requests that finished or were preempted since the last step
    """

    rows: dict[int, str] = field(default_factory=dict)
    ends: dict[str, PromptEnd] = field(default_factory=dict)
    released: frozenset[str] = frozenset()


@dataclass
class Pruned(KVConnectorWorkerMetadata):
    """The message from a worker: the prompts that were pruned in a step, by request id."""

    choices: dict[str, Choice] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge the messages of tensor-parallel ranks, which must be equal.

        Raises RuntimeError if they differ.
        """
        if not isinstance(other, Pruned) or other.choices != self.choices:
            raise RuntimeError("tensor-parallel ranks have pruned differently")
        return self


def vision_runs(features: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """The (image, first, last) runs of vision tokens. features: vLLM's, one per image or video."""
    seen = (feature for feature in features or () if feature.modality in VISION)
    return tuple(
        (image, first, last)
        for image, feature in enumerate(seen, 1)
        for first, last in feature.mm_position.extract_embeds_range()
    )


def spans_of(images: Sequence[tuple[int, int, int]], length: int) -> torch.Tensor:
    """The spans (N,) int64 of a prompt, as in `plphp.policy.LayerView`. length: N."""
    spans = torch.zeros(length, dtype=torch.int64)
    for image, first, last in images:
        spans[first : last + 1] = image
    return spans
