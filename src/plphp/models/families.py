"""What is particular about a model family's images: one small entry each.

A family that is not listed is found by its config's token ids, every unbroken run an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from plphp.models import layouts, patches, sizes
from plphp.models.layouts import Layout
from plphp.models.patches import Patches, Places, Shown
from plphp.models.sizes import Sizes


@dataclass(frozen=True)
class Family:
    """images, videos: tokens per image and per video, where the processor's outputs tell
    layout: which runs make up an image, where they do not
    places, video_places: where the tokens of an image or a video lie in it
    frames: frames of a video are written as images are, and only a caller can tell
    refused: why the family cannot be pruned, where it cannot
    whole: why no token can leave its hidden states (FastV, VTW), where none can
    """

    images: Sizes = sizes.unknown
    videos: Sizes = sizes.unknown
    layout: Layout = layouts.apart
    places: Patches = patches.unknown
    video_places: Patches = patches.unknown
    frames: bool = False
    refused: str = ""
    whole: str = ""


DEEPSTACK = "image features are added to the hidden states of several layers, so no token may leave"

GRIDS = Family(
    images=sizes.grid("image_grid_thw"),
    videos=sizes.grid("video_grid_thw"),
    places=patches.grid("image_grid_thw"),
    video_places=patches.grid("video_grid_thw"),
)
DEEPSTACK_GRIDS = replace(GRIDS, whole=DEEPSTACK)
TILES_THEN_WHOLE = Family(layout=layouts.whole_last, places=patches.tiled())
GENERIC = Family()

FAMILIES: dict[str, Family] = {
    "qwen2_vl": GRIDS,
    "qwen2_5_vl": GRIDS,
    "qwen3_vl": DEEPSTACK_GRIDS,  # a video's frames have timestamps between them
    "qwen3_vl_moe": DEEPSTACK_GRIDS,
    "qwen3_5": GRIDS,
    "qwen3_5_moe": GRIDS,
    "glm4v": GRIDS,
    "glm4v_moe": GRIDS,
    # Mantis-SigLIP-Llama3 is this class
    "llava": Family(images=sizes.patches, places=patches.square),
    "llava_next": Family(images=sizes.anyres, places=patches.anyres),
    "llava_onevision": Family(
        images=sizes.anyres,
        videos=sizes.pooled_frames,
        places=patches.anyres,
        video_places=patches.pooled_frames,
    ),
    "idefics2": Family(layout=layouts.fives, places=patches.latents),
    "idefics3": TILES_THEN_WHOLE,
    "smolvlm": replace(TILES_THEN_WHOLE, frames=True),
    "aya_vision": TILES_THEN_WHOLE,
    # <img> and </img> around all tiles of an image, or a frame
    "internvl": Family(frames=True, places=patches.tiled()),
    "ovis2": Family(
        layout=layouts.chained,
        places=patches.tiled(whole_first=True, grid=patches.by_row_tokens),
    ),
    "cohere2_vision": Family(layout=layouts.chained, places=patches.tiled()),
    "mistral3": Family(
        images=sizes.merged_patches, layout=layouts.chained, places=patches.rows_of_patches
    ),
    # each crop of pan and scan (off by default) is written as an image, and counts as one
    "gemma3": Family(images=sizes.fixed("mm_tokens_per_image"), places=patches.pooled),
    "paligemma": Family(images=sizes.patches, places=patches.square),
    "mllama": Family(
        refused="vision tokens live in cross-attention layers, not in the KV cache of the prompt; "
        "there is nothing that this method could drop"
    ),
}


def sequence_refusal(config: Any) -> str:
    """Why no token can leave the hidden states of such models; empty where it can."""
    return FAMILIES.get(getattr(config, "model_type", ""), GENERIC).whole


def places(shown: Shown, video: bool = False) -> Places:
    """A rectangle for every vision token of an image or video, None for tokens without one.

    An empty list where the family does not say, or says another number of tokens than there are.
    """
    family = FAMILIES.get(getattr(shown.config, "model_type", ""), GENERIC)
    found = (family.video_places if video else family.places)(shown)
    return found if len(found) == shown.tokens else []


def refusal(config: Any) -> str:
    """Why models of this config cannot be pruned; empty where nothing speaks against it."""
    family = FAMILIES.get(getattr(config, "model_type", ""), GENERIC)
    if family.refused:
        return family.refused
    if getattr(config, "is_encoder_decoder", False):
        return (
            "its encoder reads the images and its decoder reaches them by cross-attention: there "
            "are no vision tokens in the decoder's KV cache that this method could drop"
        )
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    if any(_of_layers(text, "kv_lora_rank")):
        return (
            "its layers cache one compressed latent a token for all heads (multi-head latent "
            "attention): no head could keep tokens of its own"
        )
    return ""


def _of_layers(config: Any, name: str) -> list[Any]:
    """The values of a config's attribute, one if all layers share it; what is missing is None."""
    if name in (getattr(config, "per_layer_attributes", None) or ()):
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return [getattr(config, name, None)]
