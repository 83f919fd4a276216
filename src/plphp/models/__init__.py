"""Which tokens of a prompt are vision tokens. One small entry per model family."""

from plphp.models.boxes import Box, Patch, Places
from plphp.models.expected import image_tokens
from plphp.models.families import FAMILIES, places, refusal, tower_names
from plphp.models.frames import frames_of
from plphp.models.patches import Shown
from plphp.models.spans import describes_vision, find_spans, processor_inputs, vision_spans

__all__ = [
    "FAMILIES",
    "Box",
    "Patch",
    "Places",
    "Shown",
    "describes_vision",
    "find_spans",
    "frames_of",
    "image_tokens",
    "places",
    "processor_inputs",
    "refusal",
    "tower_names",
    "vision_spans",
]
