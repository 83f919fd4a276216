"""The real processors of the families, for images of few tokens. Each is made from a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers

from tiny.base import PATCH
from tiny.idefics import SIDE
from tiny.llava import PINPOINTS


def qwen(name: str) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        sizes = {
            "patch_size": PATCH,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "size": {"shortest_edge": 4 * 64, "longest_edge": 64 * 64},  # 4 to 64 tokens
        }
        return getattr(transformers, name)(
            transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer,
            transformers.Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False),
        )

    return processor


def qwen3(tokenizer: Any) -> Any:
    half = [0.5] * 3  # of images and videos alike: vLLM normalizes both with the image's
    sizes = {"patch_size": PATCH, "merge_size": 2, "image_mean": half, "image_std": half}
    longest = {"shortest_edge": 4 * 64, "longest_edge": 64 * 64}
    film = {"shortest_edge": 8 * 64, "longest_edge": 256 * 64}
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes, size=longest),
        tokenizer,
        transformers.Qwen3VLVideoProcessor(**sizes, size=film, cap_pixels_per_frame=False),
    )


def square(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}}


def llava(tokenizer: Any) -> Any:
    return transformers.LlavaProcessor(
        transformers.SiglipImageProcessor(**square(24)),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token="<image>",
    )


def gemma3(tokenizer: Any) -> Any:
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(**square(24)), tokenizer, image_seq_length=9
    )


def llava_next(tokenizer: Any) -> Any:
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=PINPOINTS,
        ),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def pixtral(patch: int, merge: int) -> Callable[[Any], Any]:
    def processor(tokenizer: Any) -> Any:
        side = patch * merge  # of a token
        return transformers.PixtralProcessor(
            transformers.PixtralImageProcessor(
                patch_size={"height": side, "width": side}, size={"longest_edge": 6 * side}
            ),
            tokenizer,
            patch_size=patch,
            spatial_merge_size=merge,
        )

    return processor


def onevision(tokenizer: Any) -> Any:
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(**square(16), image_grid_pinpoints=PINPOINTS),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(**square(16)),
        num_image_tokens=(16 // PATCH) ** 2,
        vision_feature_select_strategy="full",
    )


SPLIT = {
    "size": {"longest_edge": 3 * SIDE},  # up to 3 x 3 tiles
    "max_image_size": {"longest_edge": SIDE},
}
RUN = (SIDE // PATCH // 2) ** 2  # tokens of a tile


def idefics3(tokenizer: Any) -> Any:
    return transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(**SPLIT), tokenizer, image_seq_len=RUN
    )


def smolvlm(tokenizer: Any) -> Any:
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**SPLIT),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**SPLIT),
        image_seq_len=RUN,
    )


def internvl(tokenizer: Any) -> Any:
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(**square(SIDE), crop_to_patches=True, max_patches=6),
        tokenizer,
        transformers.InternVLVideoProcessor(**square(SIDE)),
        image_seq_length=RUN,
    )
