"""Tiny random models of the real transformers classes, and prompts for them.

Images are pixels that go through the model's own vision tower, and prompts have the placeholder
layout that the processor of the family writes. `spans` follows from how the prompt was put
together; it is not read from a config and not guessed from ids. A row depends only on its `RowSpec`
and the seed, so that the same row can be made alone and inside a padded batch.

To add a family, write one entry in the file of related families.
"""

from tiny import decoders, grids, idefics, llava, others, tiles
from tiny.base import (
    IMAGE,
    PAD,
    SPECIAL,
    TEXT,
    VIDEO,
    VOCAB,
    Family,
    Image,
    Row,
    RowSpec,
    left_pad,
    mm_types,
    no_types,
    randomize,
)
from tiny.refused import MODELS, Refused

__all__ = [
    "CORE",
    "CROSSING",
    "DECODERS",
    "FAMILIES",
    "IMAGE",
    "NONE",
    "ONE",
    "PAD",
    "REFUSED",
    "ROWS",
    "SPECIAL",
    "TEXT",
    "THREE",
    "TOUCHING",
    "VARIANTS",
    "VIDEO",
    "VIDEOS",
    "VOCAB",
    "Family",
    "Image",
    "Refused",
    "Row",
    "RowSpec",
    "left_pad",
    "mm_types",
    "no_types",
    "randomize",
]

EVERY = [*grids.FAMILIES, *llava.FAMILIES, *idefics.FAMILIES, *tiles.FAMILIES, *others.FAMILIES]

# All families of design.md, section 6; the installed transformers may lack some
FAMILIES: dict[str, Family] = {family.name: family for family in EVERY}
# One family of each kind of position and mask, for tests that need no more
CORE: dict[str, Family] = {
    name: FAMILIES[name] for name in ("qwen2_vl", "llava", "llava_onevision", "idefics2")
}
# The same classes with other options
VARIANTS: dict[str, Family] = {family.name: family for family in idefics.VARIANTS}

# One class with decoders in which some layers have no ordinary attention
DECODERS: dict[str, Family] = {family.name: family for family in decoders.HYBRID}
# Models that cannot be pruned
REFUSED: dict[str, Refused] = {model.name: model for model in (*MODELS, *decoders.HOPELESS)}

# Rows that conformance tests use: one image, three, and both beside a row without any
ONE = RowSpec(images=1, text=40)
THREE = RowSpec(images=3, text=40)
NONE = RowSpec(images=0, text=23)
ROWS: dict[str, tuple[RowSpec, ...]] = {
    "one": (ONE,),
    "three": (THREE,),
    "batch": (NONE, ONE, THREE),
}
# Two videos in a row, beside one and beside none
VIDEOS = (NONE, RowSpec(images=0, text=30, videos=1), RowSpec(images=0, text=30, videos=2))
# Three images without text between them
TOUCHING = (NONE, RowSpec(images=3, text=30, touching=True))
# Three images of 22 and this text are 122 and 125 tokens: decoding crosses the window of
# idefics2_window
CROSSING = (RowSpec(images=3, text=56), RowSpec(images=3, text=59))
