"""Which tokens are vision: one small entry a model family."""

from plphp.models.families import FAMILIES, refusal, sequence_refusal
from plphp.models.spans import describes_vision, find_spans, processor_inputs, vision_spans

__all__ = [
    "FAMILIES",
    "describes_vision",
    "find_spans",
    "processor_inputs",
    "refusal",
    "sequence_refusal",
    "vision_spans",
]
