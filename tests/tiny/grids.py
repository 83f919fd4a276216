"""Families whose processors cut images and videos into patch grids: Qwen-VL and GLM-4V.

Qwen-VL writes <|vision_start|>, one <|image_pad|> for each 2 x 2 patches, and <|vision_end|>.
Qwen3-VL writes a video frame by frame, with a timestamp before each. GLM-4V writes the timestamp
after each frame, all inside <|begin_of_video|> ... <|end_of_video|>, and its frames consist of the
token of images.
"""

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig

from tiny.base import (
    DIGITS,
    GRID,
    IMAGE,
    PATCH,
    ROW,
    STAMP,
    TEXT,
    VIDEO,
    VISION_END,
    VISION_START,
    Family,
    Image,
    Row,
    flat,
    mm_types,
    noise,
)

GRIDS = ((8, 12), (12, 12), (8, 8), (4, 20))  # in patches, height and width
FRAMES = (2, 3)  # temporal patches, two frames each
VIDEO_GRIDS = ((4, 8), (4, 4))
VIDEO_START, VIDEO_END = GRID, ROW  # of GLM-4V
IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
TOWER = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def rope(**more: object) -> dict[str, Any]:
    """Options of M-RoPE, a new dict for every config: transformers writes theta into it."""
    return {"rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], **more}}


def interleaved() -> dict[str, Any]:
    """transformers always interleaves; vLLM does if the config says so, as published ones do."""
    return rope(mrope_interleaved=True)


def qwen2_vl_config() -> PreTrainedConfig:
    return transformers.Qwen2VLConfig(
        text_config=TEXT | rope(),
        vision_config=TOWER | {"embed_dim": 64, "hidden_size": TEXT["hidden_size"], "mlp_ratio": 2},
        **IDS,
    )


def qwen2_5_vl_config() -> PreTrainedConfig:
    return transformers.Qwen2_5_VLConfig(
        text_config=TEXT | rope(),
        vision_config=TOWER
        | {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": TEXT["hidden_size"],
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
        },
        **IDS,
    )


# the features of both tower blocks are also added in the first decoder layers (deepstack)
QWEN3_TOWER = TOWER | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}


def qwen3_vl_config() -> PreTrainedConfig:
    return transformers.Qwen3VLConfig(
        text_config=TEXT | interleaved() | {"head_dim": 16}, vision_config=QWEN3_TOWER, **IDS
    )


def qwen3_vl_moe_config() -> PreTrainedConfig:
    return transformers.Qwen3VLMoeConfig(
        text_config=TEXT
        | interleaved()
        | {
            "head_dim": 16,
            "moe_intermediate_size": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
        vision_config=QWEN3_TOWER,
        **IDS,
    )


def qwen3_5_config() -> PreTrainedConfig:
    """Linear attention in the first layer, and rotary positions for a part of each head."""
    return transformers.Qwen3_5Config(
        text_config=TEXT
        | {
            "head_dim": 16,
            "layer_types": ["linear_attention", *["full_attention"] * 3],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
            },
        },
        vision_config={k: v for k, v in QWEN3_TOWER.items() if k != "deepstack_visual_indexes"},
        tie_word_embeddings=False,
        **IDS,
    )


def glm4v_config() -> PreTrainedConfig:
    return transformers.Glm4vConfig(
        text_config=TEXT | rope(),
        vision_config=TOWER
        | {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": TEXT["hidden_size"],
            "image_size": 48,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )


def image(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    height, width = GRIDS[(index + count) % len(GRIDS)]
    layout = (VISION_START, *[IMAGE] * (height * width // 4), VISION_END)
    # a temporal patch has two frames: one frame is used twice
    frame = noise(generator, 3, height * width, PATCH * PATCH).transpose(0, 1)
    pixels = frame.unsqueeze(2).expand(-1, -1, 2, -1).reshape(height * width, -1)
    return Image(layout, pixels, (1, height, width))


def clip(index: int, generator: torch.Generator, layout: tuple[int, ...]) -> Image:
    """A video: its patches are flattened, as the processor does."""
    size = video_size(index)
    patches = size[0] * size[1] * size[2]
    pixels = noise(generator, 3, patches, 2 * PATCH * PATCH).transpose(0, 1).reshape(patches, -1)
    return Image(layout, pixels, size, video=True)


def video_size(index: int) -> tuple[int, int, int]:
    return (FRAMES[index % 2], *VIDEO_GRIDS[index % 2])


def frame_tokens(index: int) -> int:
    _, height, width = video_size(index)
    return height * width // 4


def qwen2_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    tokens = frame_tokens(index) * video_size(index)[0]
    return clip(index, generator, (VISION_START, *[VIDEO] * tokens, VISION_END))


def qwen3_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    """<0.3 seconds><|vision_start|>...<|vision_end|><0.8 seconds>... inside the chat template's
    own <|vision_start|> and <|vision_end|>."""
    layout = [VISION_START]
    for frame in range(video_size(index)[0]):
        stamp = (STAMP, DIGITS[frame], STAMP)
        layout += [*stamp, VISION_START, *[VIDEO] * frame_tokens(index), VISION_END]
    return clip(index, generator, (*layout, VISION_END))


def glm4v_video(config: Any, index: int, count: int, generator: torch.Generator) -> Image:
    layout = [VIDEO_START]
    for frame in range(video_size(index)[0]):
        tokens = [IMAGE] * frame_tokens(index)
        layout += [VISION_START, *tokens, VISION_END, DIGITS[frame]]
    return clip(index, generator, (*layout, VIDEO_END))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    inputs = {}
    for video, pixels, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        items = [item for item in flat(rows) if item.video == video]
        if items:
            inputs[pixels] = torch.cat([item.pixels for item in items])
            inputs[grid] = torch.tensor([item.size for item in items])
    return inputs


FAMILIES = (
    Family(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        qwen2_vl_config,
        image,
        collate,
        qwen2_video,
        mm_types,
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        qwen2_5_vl_config,
        image,
        collate,
        qwen2_video,
        mm_types,
    ),
    Family(
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        qwen3_vl_config,
        image,
        collate,
        qwen3_video,
        mm_types,
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        qwen3_vl_moe_config,
        image,
        collate,
        qwen3_video,
        mm_types,
    ),
    Family(
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        qwen3_5_config,
        image,
        collate,
        qwen3_video,
        mm_types,
        alone=(0,),
        keyless=(0,),
    ),
    Family(
        "glm4v",
        "Glm4vForConditionalGeneration",
        glm4v_config,
        image,
        collate,
        glm4v_video,
        mm_types,
    ),
)
