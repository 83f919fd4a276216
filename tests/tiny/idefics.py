"""Idefics2, Idefics3 and SmolVLM: an image, or each of its tiles, is a fixed number of tokens.

Idefics2 writes five tiles (four quarters and the whole image) or one, with a fake token around
each. Idefics3 and SmolVLM write the tiles row by row, with <fake><row_1_col_2> before each and a
newline after a row, and last the whole image after <fake><global-img>. SmolVLM writes a video as
frames, each like a whole image after a line with its time.
"""

from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from tiny.base import (
    DIGITS,
    FAKE,
    GLOBAL,
    IMAGE,
    NEWLINE,
    PATCH,
    STAMP,
    TEXT,
    TILE,
    VISION,
    Family,
    Image,
    Row,
    noise,
)

SIZES = ((16, 12), (16, 16), (12, 16))
TILES = 5  # of Idefics2 with image splitting
WINDOW = 128  # longer than the prompts of CROSSING, shorter than these with 16 new tokens
SIDE = 24  # of a tile of Idefics3
FRAMES = 3


def idefics2_config(window: int | None = None) -> PreTrainedConfig:
    # no sliding window given: the default is 4096, for every layer
    sliding = {} if window is None else {"sliding_window": window}
    return transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**TEXT, **sliding),
        vision_config={**VISION, "num_hidden_layers": 2, "image_size": 16, "patch_size": PATCH},
        perceiver_config={
            "hidden_size": TEXT["hidden_size"],
            "resampler_n_latents": 20,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 16,
            "num_key_value_heads": 2,
        },
        image_token_id=IMAGE,
    )


def tower() -> dict[str, Any]:
    return {**VISION, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH}


def idefics3_config() -> PreTrainedConfig:
    return transformers.Idefics3Config(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=tower(), image_token_id=IMAGE
    )


def smolvlm_config() -> PreTrainedConfig:
    return transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=tower(), image_token_id=IMAGE
    )


def idefics2_image(
    config: Any, index: int, count: int, generator: torch.Generator, tiles: int = 1
) -> Image:
    size = SIZES[(index + count) % len(SIZES)]
    one = (*[IMAGE] * config.perceiver_config.resampler_n_latents, FAKE)
    return Image((FAKE, *one * tiles), noise(generator, tiles, 3, *size), size)


def run(config: Any) -> list[int]:
    return [IMAGE] * (config.vision_config.image_size // PATCH // config.scale_factor) ** 2


def whole(config: Any) -> list[int]:
    return [FAKE, GLOBAL, *run(config), FAKE]


def idefics3_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    """Small images are one tile; larger ones are two or four tiles and the whole image."""
    rows, columns = ((0, 0), (2, 2), (1, 2))[(index + count) % 3]
    layout: list[int] = []
    for row in range(rows):
        for column in range(columns):
            # <row_1_col_2> is one token; every place has its own
            layout += [FAKE, (TILE, *DIGITS)[row * columns + column], *run(config)]
        layout.append(NEWLINE)
    layout += [NEWLINE] if rows else []
    pixels = noise(generator, rows * columns + 1, 3, SIDE, SIDE)
    return Image((*layout, *whole(config)), pixels, (SIDE, SIDE))


def smolvlm_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    layout = [STAMP, STAMP]
    for frame in range(FRAMES):
        layout += [NEWLINE, STAMP, DIGITS[0], DIGITS[frame], *whole(config)]
    pixels = noise(generator, FRAMES, 3, SIDE, SIDE)
    return Image((*layout, NEWLINE), pixels, (SIDE, SIDE), video=True)


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """[rows, most images in a row, ...]. Missing images are zeros, which the model drops."""
    images = [[tile for item in row.media for tile in item.pixels] for row in rows]
    sizes = [tile.shape[-2:] for row in images for tile in row]
    height, width = max(size[0] for size in sizes), max(size[1] for size in sizes)
    pixels = torch.zeros(len(rows), max(map(len, images)), 3, height, width)
    mask = torch.zeros(len(rows), max(map(len, images)), height, width, dtype=torch.long)
    for i, row in enumerate(images):
        for j, tile in enumerate(row):
            pixels[i, j, :, : tile.shape[-2], : tile.shape[-1]] = tile
            mask[i, j, : tile.shape[-2], : tile.shape[-1]] = 1
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


IDEFICS2 = "Idefics2ForConditionalGeneration"
FAMILIES = (
    Family("idefics2", IDEFICS2, idefics2_config, idefics2_image, collate, merged=FAKE),
    Family(
        "idefics3", "Idefics3ForConditionalGeneration", idefics3_config, idefics3_image, collate
    ),
    Family(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        smolvlm_config,
        idefics3_image,
        collate,
        smolvlm_video,
        videos_told=False,
    ),
)

VARIANTS = (
    Family(
        "idefics2_split",
        IDEFICS2,
        idefics2_config,
        partial(idefics2_image, tiles=TILES),
        collate,
        merged=FAKE,
    ),
    Family(
        "idefics2_window",
        IDEFICS2,
        partial(idefics2_config, WINDOW),
        idefics2_image,
        collate,
        merged=FAKE,
    ),
)
