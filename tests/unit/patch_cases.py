"""The image processors of families at small sizes, and which token sees a changed pixel.

Nothing here uses the geometry of plphp. The model's own code packs patches into tokens, or a line
of arithmetic on the processor's output gives the patch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from patch_processors import (
    CLIP,
    GOT,
    IDEFICS3,
    NEXT,
    NORMAL,
    ONEVISION,
    OVIS,
    PADDING,
    PINPOINTS,
    SIGLIP,
    SMOLVLM,
    TIGHT,
    made,
)
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from plphp.models.boxes import TILES, WHOLE


@dataclass(frozen=True)
class Case:
    """The processor of a family, and which token (ordinal, view) sees a changed pixel.

    seen: (outputs of the processor, change of pixel values, size of the image) -> view -> ordinal
    """

    processor: Any
    config: Any
    seen: Callable[[Any, Tensor, tuple[int, int]], dict[int, int]]
    runs: Callable[[Any, tuple[int, int]], list[int]]  # lengths of the runs of vision tokens
    inputs: Callable[[Any], dict[str, Any]] = lambda out: {}
    after: Callable[[Any], tuple[int, ...]] = lambda out: ()
    options: dict[str, Any] = field(default_factory=dict)
    near: float = 3.0  # pixels by which resampling may move the peak


def tower(kind: str, size: int = 56, patch: int = 14) -> SimpleNamespace:
    return SimpleNamespace(model_type=kind, image_size=size, patch_size=patch)


def peak(change: Tensor) -> tuple[int, ...]:
    """Where pixels (..., C, H, W) changed most, without the channel."""
    flat = change.abs().amax(-3)
    return tuple(int(i) for i in np.unravel_index(int(flat.argmax()), flat.shape))


def in_square(y: int, x: int, patch: int, side: int) -> int:
    return min(y // patch, side - 1) * side + min(x // patch, side - 1)


# Qwen-VL and GLM-4V: pixel values come in rows, a patch each, merged four by four


def qwen_seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
    return {WHOLE: int(change.abs().amax(-1).argmax()) // 4}


QWEN = Case(
    made("Qwen2VLImageProcessorPil", size={"shortest_edge": 3136, "longest_edge": 50000}),
    SimpleNamespace(model_type="qwen2_vl", vision_config=SimpleNamespace(spatial_merge_size=2)),
    qwen_seen,
    lambda out, size: [int(out["image_grid_thw"][0].prod()) // 4],
    lambda out: {"image_grid_thw": out["image_grid_thw"]},
)


# LLaVA: one square


def square_seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
    _, y, x = peak(change)
    return {WHOLE: in_square(y, x, 14, 4)}


def clip_with_class(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
    return {WHOLE: square_seen(out, change, size)[WHOLE] + 1}


def llava(kind: str, strategy: str) -> SimpleNamespace:
    return SimpleNamespace(
        model_type="llava", vision_config=tower(kind), vision_feature_select_strategy=strategy
    )


LLAVA = Case(CLIP, llava("clip_vision_model", "default"), square_seen, lambda o, s: [16])
LLAVA_CLASS = Case(CLIP, llava("clip_vision_model", "full"), clip_with_class, lambda o, s: [17])
MANTIS = Case(SIGLIP, llava("siglip_vision_model", "full"), square_seen, lambda o, s: [16])
LLAVA_TIGHT = Case(TIGHT, llava("clip_vision_model", "default"), square_seen, lambda o, s: [16])
LLAVA_PADDED = Case(PADDING, llava("clip_vision_model", "default"), square_seen, lambda o, s: [16])
PALIGEMMA = Case(
    SIGLIP,
    SimpleNamespace(model_type="paligemma", vision_config=tower("siglip_vision_model")),
    square_seen,
    lambda o, s: [16],
)


def pooled_seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
    _, y, x = peak(change)
    return {WHOLE: in_square(y, x, 28, 2)}


GEMMA = Case(
    made("Gemma3ImageProcessorPil", size={"height": 56, "width": 56}, **NORMAL),
    SimpleNamespace(model_type="gemma3", mm_tokens_per_image=4),
    pooled_seen,
    lambda o, s: [4],
)


# Pixtral and Mistral 3: rows of patches


def pixtral_grid(out: Any, step: int) -> tuple[int, int]:
    height, width = (int(n) for n in out["image_sizes"][0])
    return height // step, width // step


def pixtral(model_type: str, merge: int) -> Case:
    step = 8 * merge

    def seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
        _, y, x = peak(change)
        return {WHOLE: y // step * pixtral_grid(out, step)[1] + x // step}

    def runs(out: Any, size: tuple[int, int]) -> list[int]:
        rows, columns = pixtral_grid(out, step)
        return [columns] * rows

    vision = SimpleNamespace(model_type="pixtral", patch_size=8, image_size=128)
    processor = made(
        "PixtralImageProcessorPil",
        size={"longest_edge": 128},
        patch_size={"height": step, "width": step},
        **NORMAL,
    )
    return Case(
        processor,
        SimpleNamespace(model_type=model_type, vision_config=vision, spatial_merge_size=merge),
        seen,
        runs,
    )


def tiles_seen(first: bool, patch: int, side: int) -> Callable[..., dict[int, int]]:
    def seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
        change = change.reshape(-1, *change.shape[-3:])
        count, each = len(change), side * side
        found = {}
        for view, tiles in views(count, first).items():
            tile, y, x = peak(change[tiles])
            found[view] = (tiles.start + tile) * each + in_square(y, x, patch, side)
        return found

    return seen


def views(count: int, first: bool) -> dict[int, slice]:
    if count == 1:
        return {WHOLE: slice(0, 1)}
    if first:
        return {WHOLE: slice(0, 1), TILES: slice(1, count)}
    return {TILES: slice(0, count - 1), WHOLE: slice(count - 1, count)}


def tile_count(out: Any) -> int:
    return int(out["pixel_values"].reshape(-1, *out["pixel_values"].shape[-3:]).shape[0])


def tiled(processor: Any, model_type: str, first: bool = False, joined: bool = False) -> Case:
    def runs(out: Any, size: tuple[int, int]) -> list[int]:
        return [4 * tile_count(out)] if joined else [4] * tile_count(out)

    config = SimpleNamespace(
        model_type=model_type, image_seq_length=4, visual_indicator_token_ids=[1, 2, 3, 4, 5]
    )
    after = grid_tokens if model_type == "ovis2" else lambda out: ()
    return Case(processor, config, tiles_seen(first, 28, 2), runs, after=after)


def grid_tokens(out: Any) -> tuple[int, ...]:
    """What Ovis2's processor writes after the whole image and each tile, from its own `grids`."""
    rows, columns = (int(n) for n in out["grids"][0])
    if rows * columns == 1:
        return (2,)
    return (3, *([*[4] * (columns - 1), 5] * rows)[:-1], 2)


def latents_seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
    """Every latent of the quarter sees it; the first one stands for all."""
    quarter, _, _ = peak(change[0][:4])
    return {TILES: quarter * 5, WHOLE: 20}


IDEFICS2 = Case(
    made(
        "Idefics2ImageProcessorPil",
        size={"shortest_edge": 40, "longest_edge": 96},
        do_image_splitting=True,
        **NORMAL,
    ),
    SimpleNamespace(model_type="idefics2"),
    latents_seen,
    lambda o, s: [5] * 5,
)


# LLaVA-NeXT and OneVision: the model's own code packs one-hot features of patches into tokens


def packed(model: Any, **options: Any) -> Callable[..., dict[int, int]]:
    def seen(out: Any, change: Tensor, size: tuple[int, int]) -> dict[int, int]:
        features = torch.zeros(change.shape[1], 16, 1)
        found = {}
        for view, tiles in views(change.shape[1], True).items():
            tile, y, x = peak(change[0, tiles])
            features.zero_()
            features[tiles.start + tile, in_square(y, x, 14, 4)] = 1
            tokens = pack(model, features, size, **options)
            if bool(tokens.any()):  # a row half of padding is cut off with the padding
                found[view] = int(tokens.argmax())
        return found

    return seen


def pack(model: Any, features: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
    config = SimpleNamespace(vision_config=tower("siglip_vision_model"), **ANYRES)
    own = SimpleNamespace(config=config)
    newline = torch.zeros(1)
    sizes = torch.tensor([[size[1], size[0]]])
    tokens = model.pack_image_features(own, [features], sizes, image_newline=newline, **options)[0]
    return tokens[0][:, 0]


ANYRES: dict[str, Any] = {
    "image_grid_pinpoints": PINPOINTS,
    "vision_feature_select_strategy": "full",
}


def anyres(model: Any, processor: Any, model_type: str, **options: Any) -> Case:
    def runs(out: Any, size: tuple[int, int]) -> list[int]:
        tiles = out["pixel_values"].shape[1]
        return [len(pack(model, torch.zeros(tiles, 16, 1), size, **options))]

    config = SimpleNamespace(
        model_type=model_type, vision_config=tower("siglip_vision_model"), **ANYRES, **ASPECT
    )
    return Case(processor, config, packed(model, **options), runs, near=5.0)


ASPECT = {"vision_aspect_ratio": "anyres_max_9"}

CASES = {
    "qwen2_vl": QWEN,
    "llava": LLAVA,
    "llava with class token": LLAVA_CLASS,
    "llava cropped tightly": LLAVA_TIGHT,
    "llava padded": LLAVA_PADDED,
    "mantis": MANTIS,
    "paligemma": PALIGEMMA,
    "gemma3": GEMMA,
    "pixtral": pixtral("llava", 1),
    "mistral3": pixtral("mistral3", 2),
    "idefics2": IDEFICS2,
    "idefics3": tiled(IDEFICS3, "idefics3"),
    "smolvlm": tiled(SMOLVLM, "smolvlm"),
    "internvl": tiled(GOT, "internvl", joined=True),
    "aya_vision": tiled(GOT, "aya_vision"),
    "ovis2": tiled(OVIS, "ovis2", first=True),
    "llava_next": anyres(LlavaNextModel, NEXT, "llava_next", vision_feature_select_strategy="full"),
    "llava_onevision": anyres(
        LlavaOnevisionModel, ONEVISION, "llava_onevision", vision_aspect_ratio="anyres_max_9"
    ),
}
