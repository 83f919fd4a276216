"""How each model family writes images into a prompt: one small entry per family.

For a family without an entry, the config's token ids say which tokens are vision tokens, and each
unbroken run of them is one image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from plphp.models import layouts, patches, sizes, towers
from plphp.models.boxes import Places
from plphp.models.layouts import Layout
from plphp.models.patches import Patches, Shown
from plphp.models.sizes import Sizes
from plphp.models.towers import TowerNames


@dataclass(frozen=True)
class Family:
    """The properties of one model family.

    images, videos: functions that compute the tokens of each image and of each video from the
        processor's outputs
    layout: function that groups runs of vision tokens into images, used where the token counts are
        unknown
    places, video_places: functions that compute the part of an image or a video that each vision
        token shows
    frames: whether the prompt marks the frames of a video as it marks images, so that the token
        ids do not tell them apart
    tower: the vision tower and how its patches become vision tokens, or why they do not; None for
        a tower that is not known
    types: name of the token types that its forward takes, if it takes any
    refused: the reason why the family cannot be pruned, or an empty string
    """

    images: Sizes = sizes.unknown
    videos: Sizes = sizes.unknown
    layout: Layout = layouts.run_per_image
    places: Patches = patches.unknown
    video_places: Patches = patches.unknown
    frames: bool = False
    tower: TowerNames | None = None
    types: str = "mm_token_type_ids"
    refused: str = ""


GRIDS = Family(
    images=sizes.grid("image_grid_thw"),
    videos=sizes.grid("video_grid_thw"),
    places=patches.grid("image_grid_thw"),
    video_places=patches.grid("video_grid_thw"),
    tower=towers.GRIDS,
)
TILES_THEN_WHOLE = Family(layout=layouts.whole_last, places=patches.tiled())
GENERIC = Family()

FAMILIES: dict[str, Family] = {
    "qwen2_vl": GRIDS,
    "qwen2_5_vl": GRIDS,
    "qwen3_vl": GRIDS,  # a video's frames have timestamps between them
    "qwen3_vl_moe": GRIDS,
    "qwen3_5": GRIDS,
    "qwen3_5_moe": GRIDS,
    "glm4v": GRIDS,
    "glm4v_moe": GRIDS,
    # Mantis-SigLIP-Llama3 uses this class.
    "llava": Family(images=sizes.patches, places=patches.square, tower=towers.LLAVA),
    "llava_next": Family(images=sizes.anyres, places=patches.anyres, tower=towers.LLAVA),
    "llava_onevision": Family(
        images=sizes.anyres,
        videos=sizes.pooled_frames,
        places=patches.anyres,
        video_places=patches.pooled_frames,
        tower=towers.RESIZED,
    ),
    "idefics2": Family(
        layout=layouts.one_or_five_runs, places=patches.latents, tower=towers.LATENTS
    ),
    "idefics3": replace(TILES_THEN_WHOLE, tower=towers.CONNECTED),
    "smolvlm": replace(TILES_THEN_WHOLE, frames=True, tower=towers.CONNECTED),
    "aya_vision": replace(TILES_THEN_WHOLE, tower=towers.TILES),
    # <img> and </img> surround all tiles of an image, or one frame of a video.
    "internvl": Family(frames=True, places=patches.tiled(), tower=towers.INTERNVL),
    "ovis2": Family(
        layout=layouts.joined_by_one_token,
        places=patches.tiled(whole_first=True, grid=patches.by_row_tokens),
        tower=towers.TABLE,
    ),
    "cohere2_vision": Family(
        layout=layouts.joined_by_one_token, places=patches.tiled(), tower=towers.TILES
    ),
    "mistral3": Family(
        images=sizes.merged_patches,
        layout=layouts.joined_by_one_token,
        places=patches.rows_of_patches,
        tower=towers.LLAVA,
    ),
    # Each crop of pan and scan (off by default) is written as an image, and counts as one.
    "gemma3": Family(
        images=sizes.fixed("mm_tokens_per_image"),
        places=patches.pooled,
        tower=towers.GEMMA,
        types="token_type_ids",
    ),
    "paligemma": Family(images=sizes.patches, places=patches.square, tower=towers.LLAVA),
    "mllama": Family(
        refused="its vision tokens are in cross-attention layers and not in the KV cache of the "
        "prompt, so that there is nothing to prune"
    ),
}


def places(shown: Shown, video: bool = False) -> Places:
    """The part of the image or video that each of its vision tokens shows, in prompt order.

    None stands for a token that shows no part, such as a line end. The list is empty where the
    family has no such function, or where the function finds another number of tokens than the
    prompt has.
    """
    family = FAMILIES.get(getattr(shown.config, "model_type", ""), GENERIC)
    found = (family.video_places if video else family.places)(shown)
    return found if len(found) == shown.tokens else []


def tower_names(config: Any) -> TowerNames | None:
    """The tower of a model and how its patches become vision tokens; None if it is not known."""
    return FAMILIES.get(getattr(config, "model_type", ""), GENERIC).tower


def refusal(config: Any) -> str:
    """The reason why models of this config cannot be pruned, or an empty string."""
    family = FAMILIES.get(getattr(config, "model_type", ""), GENERIC)
    if family.refused:
        return family.refused
    if getattr(config, "is_encoder_decoder", False):
        return (
            "it is an encoder-decoder model whose decoder reads the images by cross-attention: its "
            "KV cache holds no vision tokens that could be pruned"
        )
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    # Where layers differ, transformers refuses to read such an attribute of the config itself.
    layers = getattr(text, "per_layer_config", None) or [text]
    if any(getattr(layer, "kv_lora_rank", None) for layer in layers):
        return (
            "its layers cache one compressed latent vector per token for all heads (multi-head "
            "latent attention), so that heads cannot keep different tokens"
        )
    return ""
