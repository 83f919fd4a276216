"""Tiny random checkpoints on disk, of the families that vLLM has, with their real processors.

Models and weights are those of `tests/tiny`, with heads as wide as vLLM's CPU attention wants them.
Text is read character by character, so that a processor may write any text between images. A new
family is one entry of `CHECKPOINTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

import tiny
from tiny.base import (
    BREAK,
    FAKE,
    GLOBAL,
    IMAGE,
    PAD,
    PATCH,
    TILE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
)
from tiny.idefics import SIDE
from tiny.llava import PINPOINTS

CHARACTERS = ["\n", *map(chr, range(32, 127)), *map(chr, range(0xC0, 0x17F))]
WEIGHTS = "model.safetensors"
SIGLIP = "vision_tower.vision_model."
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'video' %}VIDEO"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)
HEADS, WIDTH = 4, 32  # of the text model, which has as many channels as in tests/tiny


@dataclass(frozen=True)
class Checkpoint:
    """How one family is written to disk.

    family: its name in tests/tiny
    names: what its processor calls special tokens, by their ids
    processor: its processor, around a tokenizer
    image, video: what its chat template writes for one
    roles: tokens that the processor asks the tokenizer for by attribute
    frames: how long videos are; empty where vLLM takes none
    tower: how published checkpoints name the vision tower, where transformers 5 writes it otherwise
    differs: what vLLM does otherwise than transformers, for docs/vllm.md
    slow: only in the long run of the tests
    """

    family: str
    names: Mapping[int, str]
    processor: Callable[[Any], Any]
    image: str
    video: str = ""
    roles: Mapping[str, str] = field(default_factory=dict)
    frames: tuple[int, ...] = ()
    tower: str = ""
    differs: str = "nothing"
    slow: bool = False

    def save(self, folder: Path, seed: int = 0) -> None:
        """Config, weights, tokenizer, processor and chat template."""
        family = tiny.FAMILIES[self.family]
        family.build(seed, wide(family.config())).save_pretrained(folder)
        if self.tower:
            weights = load_file(folder / WEIGHTS)
            named = {name.replace("vision_tower.", self.tower): w for name, w in weights.items()}
            save_file(named, folder / WEIGHTS, {"format": "pt"})
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """All but config and weights."""
        processor = self.processor(tokenizer(self.names, self.roles))
        template = TEMPLATE.replace("IMAGE", self.image).replace("VIDEO", self.video)
        processor.chat_template = processor.tokenizer.chat_template = template
        processor.save_pretrained(folder)


def wide(config: Any) -> Any:
    """The config with fewer and wider heads in its decoder."""
    text = config.get_text_config()
    text.num_attention_heads = HEADS
    text.head_dim = WIDTH
    if sections := text.rope_parameters.get("mrope_section"):
        doubled = [2 * width for width in sections]
        text.rope_parameters = text.rope_parameters | {"mrope_section": doubled}
    return config


def tokenizer(names: Mapping[int, str], roles: Mapping[str, str]) -> Any:
    """One token a character, behind special tokens that are never characters."""
    special = [names.get(number, f"<unused{number}>") for number in range(tiny.SPECIAL)]
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS][:VOCAB])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=special[1]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    made.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=special[PAD],
        eos_token=special[2],
        extra_special_tokens=dict(roles),
    )


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


QWEN = {
    "names": {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        VISION_START: "<|vision_start|>",
        VISION_END: "<|vision_end|>",
    },
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
    "frames": (2, 4, 6),
}
PIXTRAL = {
    "names": {IMAGE: "[IMG]", BREAK: "[IMG_BREAK]", VISION_END: "[IMG_END]"},
    "image": "[IMG]",
}
TILES = {TILE + i: f"<row_{1 + i // 3}_col_{1 + i % 3}>" for i in range(9)}
IDEFICS = {
    "names": {
        IMAGE: "<image>",
        VIDEO: "<video>",
        FAKE: "<fake_token_around_image>",
        GLOBAL: "<global-img>",
        18: "<end_of_utterance>",
        **TILES,
    },
    "image": "<image>",
}

CHECKPOINTS = {
    made.family: made
    for made in (
        Checkpoint("qwen2_vl", processor=qwen("Qwen2VLProcessor"), **QWEN),
        Checkpoint(
            "qwen2_5_vl",
            processor=qwen("Qwen2_5_VLProcessor"),
            differs="a video must come with its frame rate",
            **QWEN,
        ),
        Checkpoint("llava", {IMAGE: "<image>"}, llava, "<image>", tower=SIGLIP),
        Checkpoint(
            "llava_onevision",
            {IMAGE: "<image>", VIDEO: "<video>"},
            onevision,
            "<image>",
            "<video>",
            frames=(4,),
            tower=SIGLIP,
            differs="every image is tiled, in transformers only one that has its prompt to itself; "
            "videos of different lengths in one step stop vLLM 0.32, pruned or not",
        ),
        Checkpoint("idefics3", processor=idefics3, **IDEFICS),
        Checkpoint(
            "smolvlm",
            processor=smolvlm,
            differs="no video; its processor wants `pip install num2words`",
            **IDEFICS,
        ),
        Checkpoint(
            "internvl",
            {
                IMAGE: "<IMG_CONTEXT>",
                VIDEO: "<video>",
                VISION_START: "<img>",
                VISION_END: "</img>",
            },
            internvl,
            "<IMG_CONTEXT>",
            "<video>",
            frames=(2, 3, 4),
            roles={
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
            differs="a video is one image, in transformers each of its frames is one unless "
            "`vision_mask` says otherwise",
        ),
        Checkpoint("qwen3_vl", processor=qwen3, slow=True, **QWEN),
        Checkpoint(
            "llava_next", {IMAGE: "<image>"}, llava_next, "<image>", tower=SIGLIP, slow=True
        ),
        Checkpoint("pixtral", processor=pixtral(2 * PATCH, 1), slow=True, **PIXTRAL),
        Checkpoint("mistral3", processor=pixtral(PATCH, 2), slow=True, **PIXTRAL),
    )
}
