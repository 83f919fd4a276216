"""Families that cut images into equal tiles: InternVL, Ovis2, Aya Vision, Cohere2 Vision.

InternVL: <img>, the tiles without a break, </img>; a video is lines "Frame1: <img>...</img>".
Ovis2: <start>, the whole image, <grid>, the tiles with <col> and <row> between them, <end>.
Aya Vision: <start>, every tile behind TILE_1, TILE_2, ..., the whole image behind TILE_GLOBAL,
<end>. Cohere2 Vision: <start>, every tile and a line break behind it, <end>.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from tiny.base import (
    BREAK,
    COLUMN,
    DIGITS,
    GLOBAL,
    GRID,
    IMAGE,
    NEWLINE,
    PATCH,
    ROW,
    STAMP,
    TEXT,
    TILE,
    VISION,
    VISION_END,
    VISION_START,
    Family,
    Image,
    Row,
    flat,
    noise,
    siglip_config,
)

SIDE = 24
TILES = ((1, 1), (1, 2), (2, 1))  # rows and columns
FRAMES = 3
WINDOW = 20  # shorter than every prompt of the tests


def internvl_config() -> PreTrainedConfig:
    return transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "image_size": [SIDE, SIDE],
            "patch_size": [PATCH, PATCH],
        },
        image_token_id=IMAGE,
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def ovis2_config() -> PreTrainedConfig:
    return transformers.Ovis2Config(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={
            **VISION,
            "num_hidden_layers": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "vocab_size": 64,
            "hidden_stride": 2,
            "num_visual_indicator_tokens": 5,
        },
        image_token_id=IMAGE,
        visual_indicator_token_ids=[VISION_START, VISION_END, GRID, COLUMN, ROW],
        vocab_size=TEXT["vocab_size"],
        hidden_size=TEXT["hidden_size"],
        tie_word_embeddings=False,
    )


def aya_vision_config() -> PreTrainedConfig:
    """The text model's sliding window is the default of 4096: longer than any prompt here."""
    return transformers.AyaVisionConfig(
        text_config=transformers.Cohere2Config(**TEXT, logit_scale=1.0),
        vision_config=siglip_config(SIDE),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )


def cohere2_vision_config() -> PreTrainedConfig:
    """One of the four text layers slides, and every prompt here is longer than its window."""
    kinds = ["sliding_attention", *["full_attention"] * 3]
    text = transformers.Cohere2Config(
        **TEXT, logit_scale=1.0, sliding_window=WINDOW, layer_types=kinds
    )
    return transformers.Cohere2VisionConfig(
        text_config=text,
        vision_config=siglip_config(SIDE),
        image_token_id=IMAGE,
        alignment_intermediate_size=96,
        tie_word_embeddings=False,
    )


TOKENS = (SIDE // PATCH // 2) ** 2  # of a tile: all four merge 2 x 2 patches


def tiles_of(index: int, count: int) -> tuple[int, int]:
    return TILES[(index + count) % len(TILES)]


def pixels_of(generator: torch.Generator, tiles: int) -> Tensor:
    return noise(generator, tiles, 3, SIDE, SIDE)


def with_whole(rows: int, columns: int) -> int:
    """Tiles of an image; where it is cut, the whole image is one more."""
    return rows * columns + (rows * columns > 1)


def internvl_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    tiles = with_whole(*tiles_of(index, count))
    layout = (VISION_START, *[IMAGE] * (tiles * TOKENS), VISION_END)
    return Image(layout, pixels_of(generator, tiles), (SIDE, SIDE))


def internvl_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    layout: list[int] = []
    for frame in range(FRAMES):
        layout += [NEWLINE] if frame else []
        line = [STAMP, DIGITS[frame], BREAK]  # "Frame", its number, ": "
        layout += [*line, VISION_START, *[IMAGE] * TOKENS, VISION_END]
    return Image(tuple(layout), pixels_of(generator, FRAMES), (SIDE, SIDE), video=True)


def ovis2_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    rows, columns = tiles_of(index, count)
    tile = [IMAGE] * TOKENS
    layout = [VISION_START, *tile, GRID]
    if rows * columns > 1:
        for row in range(rows):
            for column in range(columns):
                layout += [*tile, *([COLUMN] if column < columns - 1 else [])]
            layout += [ROW] if row < rows - 1 else []
    pixels = pixels_of(generator, with_whole(rows, columns))
    return Image((*layout, VISION_END), pixels, (SIDE, SIDE))


def aya_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    tiles = with_whole(*tiles_of(index, count))
    layout = [VISION_START]
    for number in range(1, tiles):
        layout += [TILE, DIGITS[number - 1], *[IMAGE] * TOKENS]  # TILE_1 in two tokens
    layout += [GLOBAL, *[IMAGE] * TOKENS, VISION_END]
    return Image(tuple(layout), pixels_of(generator, tiles), (SIDE, SIDE))


def cohere2_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    tiles = with_whole(*tiles_of(index, count))
    layout = (VISION_START, *(*[IMAGE] * TOKENS, BREAK) * tiles, VISION_END)
    return Image(layout, pixels_of(generator, tiles), (SIDE, SIDE))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Tiles and frames of all rows, one after another."""
    return {"pixel_values": torch.cat([item.pixels for item in flat(rows)])}


FAMILIES = (
    Family(
        "internvl",
        "InternVLForConditionalGeneration",
        internvl_config,
        internvl_image,
        collate,
        internvl_video,
        videos_told=False,
    ),
    Family("ovis2", "Ovis2ForConditionalGeneration", ovis2_config, ovis2_image, collate),
    Family(
        "aya_vision", "AyaVisionForConditionalGeneration", aya_vision_config, aya_image, collate
    ),
    Family(
        "cohere2_vision",
        "Cohere2VisionForConditionalGeneration",
        cohere2_vision_config,
        cohere2_image,
        collate,
        alone=(0,),
        longer=WINDOW,
    ),
)
