"""Where the modules of a vision tower are, for families whose vision tokens are patches of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerNames:
    """A vision tower whose vision tokens are squares of its patches, each one projected by itself.

    tower: name of the tower itself
    projector: name of what projects its features into the space of the language model
    side: function from the model's config to the number of patches along the side of a square
    rows: whether the tower orders patches row by row, else square by square
    reason: why the tower cannot be used, by the model's config; an empty string where it can
    """

    tower: str
    projector: str
    side: Callable[[Any], int] = lambda config: 1
    rows: bool = False
    reason: Callable[[Any], str] = lambda config: ""


def _one_sequence(config: Any) -> str:
    pixtral = getattr(config.vision_config, "model_type", "") == "pixtral"
    return "it reads all images as one sequence" if pixtral else ""


def _pooled(config: Any) -> int:
    """Gemma 3: the projector averages squares, so that an image has `mm_tokens_per_image`."""
    patches = int(config.vision_config.image_size) // int(config.vision_config.patch_size)
    return patches // int(config.mm_tokens_per_image**0.5)


def _never(reason: str) -> TowerNames:
    """For a family whose vision tokens are no patches of the tower."""
    return TowerNames("", "", reason=lambda config: reason)


LLAVA = TowerNames("vision_tower", "multi_modal_projector", reason=_one_sequence)
GRIDS = TowerNames("visual", "visual.merger", lambda c: int(c.vision_config.spatial_merge_size))
CONNECTED = TowerNames("vision_model", "connector", lambda c: int(c.scale_factor), rows=True)
TILES = TowerNames(LLAVA.tower, LLAVA.projector, lambda c: int(c.downsample_factor), rows=True)
INTERNVL = TowerNames(
    LLAVA.tower, LLAVA.projector, lambda c: round(1 / c.downsample_ratio), rows=True
)
GEMMA = TowerNames(LLAVA.tower, LLAVA.projector, _pooled, rows=True)
RESIZED = _never("it resizes the features of tiles and frames behind the projector")
LATENTS = _never("its vision tokens are latents of a resampler")
TABLE = _never("its vision tokens are mixtures of the entries of a table")
