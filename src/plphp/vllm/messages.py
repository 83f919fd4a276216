"""What travels between the scheduler's side and the workers' side, once a step each way."""

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
    """What a prompt keeps. The scheduler remembers it for a request that is preempted.

    dead: per cache group, how many leading blocks hold nothing any more
    kept: per layer, vision tokens that every KV head keeps
    rates, classes: per layer, as in `plphp.policy.KeepPlan`
    """

    dead: tuple[int, ...]
    kept: tuple[int, ...]
    rates: tuple[float, ...]
    classes: tuple[int, ...]


@dataclass(frozen=True)
class PromptEnd:
    """A prompt whose last token is computed in this step, so that it can be pruned.

    start, end: tokens of the request before and after this step
    length: tokens of the prompt, start < length <= end
    images: (image, first, last) runs of vision tokens, images counted from 1, `last` inclusive
    fresh: per cache group, the blocks to prune into, for the last of the prompt's full blocks;
        None to prune in place
    choice: what was chosen before the request was preempted, or None
    """

    start: int
    end: int
    length: int
    images: tuple[tuple[int, int, int], ...]
    policy: PLPHP
    fresh: tuple[tuple[int, ...], ...] | None
    choice: Choice | None


def in_use(fresh: Sequence[T], full: int, dead: int) -> Sequence[T]:
    """Of the blocks that one group reserved for a prompt of `full` full blocks, those it is in now.

    dead: full blocks that the pruned prompt does not need. Both sides ask: the scheduler for its
    own blocks, the workers for their numbers.
    """
    return fresh[len(fresh) - (full - dead) :] if 0 < dead < full else fresh[:0]


@dataclass
class Step(KVConnectorMetadata):
    """What a worker has to know about a step.

    rows: the block that each scheduled request writes last, in group 0 -> request id; it tells
        which row of the batch is which request
    gone: requests that finished or were preempted since the last step
    """

    rows: dict[int, str] = field(default_factory=dict)
    ends: dict[str, PromptEnd] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()


@dataclass
class Pruned(KVConnectorWorkerMetadata):
    """What the workers pruned in a step."""

    choices: dict[str, Choice] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Tensor-parallel ranks decide from the same numbers."""
        if not isinstance(other, Pruned) or other.choices != self.choices:
            raise RuntimeError("tensor-parallel ranks disagree about what to prune")
        return self


def vision_runs(features: Sequence[Any]) -> tuple[tuple[int, int, int], ...]:
    """(image, first, last) runs of vision tokens; a feature is one image or one video."""
    seen = (feature for feature in features or () if feature.modality in VISION)
    return tuple(
        (image, first, last)
        for image, feature in enumerate(seen, 1)
        for first, last in feature.mm_position.extract_embeds_range()
    )


def spans_of(images: Sequence[tuple[int, int, int]], length: int) -> torch.Tensor:
    """(N,) int64 spans as in `plphp.policy.LayerView`."""
    spans = torch.zeros(length, dtype=torch.int64)
    for image, first, last in images:
        spans[first : last + 1] = image
    return spans
