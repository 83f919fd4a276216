"""Gemma 3 and PaliGemma, whose image tokens see each other in both directions; Mistral 3, Pixtral.

Gemma 3: two newlines, <start_of_image>, a fixed number of tokens, <end_of_image>, two newlines;
layers take turns between a sliding window and full attention. PaliGemma: a fixed number of tokens,
and the whole prompt is seen in both directions. Pixtral and Mistral 3: rows of patches, [IMG_BREAK]
behind each but the last, which has [IMG_END].
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from tiny.base import (
    BREAK,
    IMAGE,
    NEWLINE,
    PATCH,
    TEXT,
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
WINDOW = 20  # of the sliding layers of Gemma 3: shorter than every prompt of the tests
PIXTRAL_SIZES = ((32, 48), (24, 40), (40, 32))


def gemma3_config() -> PreTrainedConfig:
    return transformers.Gemma3Config(
        text_config=TEXT
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": ["full_attention", "sliding_attention", *["full_attention"] * 2],
        },
        vision_config=siglip_config(SIDE),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
        tie_word_embeddings=False,
    )


def paligemma_config() -> PreTrainedConfig:
    return transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT, head_dim=16),
        vision_config=siglip_config(SIDE),
        image_token_index=IMAGE,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        tie_word_embeddings=False,
    )


def mistral3_config() -> PreTrainedConfig:
    return transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(
            **VISION, num_hidden_layers=2, image_size=48, patch_size=PATCH
        ),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def pixtral_config() -> PreTrainedConfig:
    """Pixtral-12B: the LLaVA class, without the merger of Mistral 3."""
    return transformers.LlavaConfig(
        text_config=transformers.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(
            **VISION, num_hidden_layers=2, image_size=48, patch_size=2 * PATCH
        ),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def gemma3_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    run = [IMAGE] * config.mm_tokens_per_image
    layout = (NEWLINE, NEWLINE, VISION_START, *run, VISION_END, NEWLINE, NEWLINE)
    return Image(layout, noise(generator, 3, SIDE, SIDE), (SIDE, SIDE))


def paligemma_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    run = (IMAGE,) * (SIDE // PATCH) ** 2
    return Image(run, noise(generator, 3, SIDE, SIDE), (SIDE, SIDE))


def pixtral_image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    height, width = PIXTRAL_SIZES[(index + count) % len(PIXTRAL_SIZES)]
    step = 2 * PATCH  # a patch of Pixtral, and what Mistral 3 merges to one
    row = [*[IMAGE] * (width // step), BREAK]
    layout = [*(row * (height // step))[:-1], VISION_END]
    return Image(tuple(layout), noise(generator, 3, height, width), (height, width))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([image.pixels for image in flat(rows)])}


def pixtral_collate(rows: list[Row]) -> dict[str, Tensor]:
    images = flat(rows)
    height, width = (max(image.size[i] for image in images) for i in (0, 1))
    pixels = torch.zeros(len(images), 3, height, width)
    for padded, image in zip(pixels, images, strict=True):
        padded[:, : image.size[0], : image.size[1]] = image.pixels
    return {
        "pixel_values": pixels,
        "image_sizes": torch.tensor([image.size for image in images]),
    }


def gemma3_types(kinds: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": kinds}


def prefix_types(kinds: Tensor) -> dict[str, Tensor]:
    """All of a prompt is prefix."""
    return {"token_type_ids": torch.zeros_like(kinds)}


FAMILIES = (
    Family(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        gemma3_config,
        gemma3_image,
        collate,
        types=gemma3_types,
        alone=(1,),
        longer=WINDOW,
    ),
    Family(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        paligemma_config,
        paligemma_image,
        collate,
        types=prefix_types,
    ),
    Family(
        "pixtral",
        "LlavaForConditionalGeneration",
        pixtral_config,
        pixtral_image,
        pixtral_collate,
    ),
    Family(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        mistral3_config,
        pixtral_image,
        pixtral_collate,
    ),
)
