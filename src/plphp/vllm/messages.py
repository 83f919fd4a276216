"""The messages between the scheduler side and the worker sides, one per step in each direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from plphp.paged.prompts import Choice, PromptEnd, PromptPart

VISION = ("image", "video")  # modalities whose tokens are pruned


@dataclass
class Step(KVConnectorMetadata):
    """The message to the workers about one step.

    ends: by request id, the prompts whose last token is computed in this step
    parts: by request id, the prompts of which this step computes tokens whose queries the method
        reads, but not the last token
    released: ids of requests that finished or were preempted since the last step
    """

    ends: dict[str, PromptEnd] = field(default_factory=dict)
    parts: dict[str, PromptPart] = field(default_factory=dict)
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
