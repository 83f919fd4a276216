"""The LLaVA families: each image is one run of image tokens.

LLaVA, as in Mantis, has a square of patches from SigLIP without its head. LLaVA-NeXT and
LLaVA-OneVision add tiles, with a newline token after every row of patches. In LLaVA-OneVision an
image is cut into tiles only if the prompt has no other one, and videos are pooled frames with one
newline token.
"""

import math
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution

from tiny.base import (
    IMAGE,
    PATCH,
    TEXT,
    VIDEO,
    VISION,
    Family,
    Image,
    Row,
    flat,
    noise,
    siglip_config,
)

SIZES = ((20, 32), (32, 24), (16, 16), (30, 11))
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]
FRAMES = 3


def llava_config() -> PreTrainedConfig:
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=siglip_config(image_size=24),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )


def next_config() -> PreTrainedConfig:
    """A CLIP tower. The default strategy drops its class token."""
    return transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=2, image_size=16, patch_size=PATCH
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
    )


def onevision_config() -> PreTrainedConfig:
    return transformers.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=siglip_config(image_size=16),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )


def llava_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    side = config.vision_config.image_size
    return Image((IMAGE,) * (side // PATCH) ** 2, noise(generator, 3, side, side), (side, side))


def next_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    return tiled(config, SIZES[(index + count) % len(SIZES)], generator)


def onevision_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    if count == 1:
        return tiled(config, SIZES[int(torch.randint(2, (), generator=generator))], generator)
    side = config.vision_config.image_size  # no tiles: the image and one newline
    tokens = (side // PATCH) ** 2 + 1
    return Image((IMAGE,) * tokens, noise(generator, 1, 3, side, side), SIZES[index % len(SIZES)])


def tiled(config: Any, size: tuple[int, int], generator: torch.Generator) -> Image:
    """The whole image, and then the rows of its tiles, each with a newline token."""
    side = config.vision_config.image_size
    best = select_best_resolution(list(size), config.image_grid_pinpoints)
    tiles = (best[0] // side) * (best[1] // side)
    height, width = unpadded(size, (best[0] // PATCH, best[1] // PATCH))
    tokens = (side // PATCH) ** 2 + height * (width + 1)
    return Image((IMAGE,) * tokens, noise(generator, 1 + tiles, 3, side, side), size)


def unpadded(size: tuple[int, int], grid: tuple[int, int]) -> tuple[int, int]:
    """The part of a grid of patches that an image of this size fills, without padding."""
    (height, width), (rows, columns) = size, grid
    if width / height > columns / rows:
        filled = int(round(height * columns / width, 7))
        return rows - (rows - filled) // 2 * 2, columns
    filled = int(round(width * rows / height, 7))
    return rows, columns - (columns - filled) // 2 * 2


def onevision_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    side = config.vision_config.image_size
    pooled = math.ceil(side // PATCH / 2) ** 2
    tokens = FRAMES * pooled + 1
    return Image(
        (VIDEO,) * tokens, noise(generator, FRAMES, 3, side, side), (side, side), video=True
    )


def llava_collate(rows: list[Row]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image.pixels for image in flat(rows)])}


def next_collate(rows: list[Row]) -> dict[str, Tensor]:
    images = [image for row in rows for image in row.images]
    most = max(len(image.pixels) for image in images)
    pixels = torch.zeros(len(images), most, *images[0].pixels.shape[1:])
    for padded, image in zip(pixels, images, strict=True):
        padded[: len(image.pixels)] = image.pixels
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([image.size for image in images]),
    }


def onevision_collate(rows: list[Row]) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = {}
    if any(row.images for row in rows):
        # rows without images are left out, as the processor does
        counts = torch.tensor([len(row.images) for row in rows if row.images])
        inputs |= next_collate(rows) | {"batch_num_images": counts}
    if any(row.videos for row in rows):
        videos = [video.pixels for row in rows for video in row.videos]
        inputs["pixel_values_videos"] = torch.stack(videos)
    return inputs


FAMILIES = (
    Family("llava", "LlavaForConditionalGeneration", llava_config, llava_image, llava_collate),
    Family(
        "llava_next", "LlavaNextForConditionalGeneration", next_config, next_image, next_collate
    ),
    Family(
        "llava_onevision",
        "LlavaOnevisionForConditionalGeneration",
        onevision_config,
        onevision_image,
        onevision_collate,
        onevision_video,
    ),
)
