"""Tiny random checkpoints on disk, of the families that vLLM supports, with their real processors.

Models and weights are those of `tests/tiny`, with the head dimension that vLLM's CPU attention
requires. The tokenizer maps each character to a token, so that a processor may write any text
between images. A new family is one entry of `CHECKPOINTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from processors import (
    gemma3,
    idefics3,
    internvl,
    llava,
    llava_next,
    onevision,
    pixtral,
    qwen,
    qwen3,
    smolvlm,
)
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

import tiny
from tiny.base import (
    BREAK,
    FAKE,
    GLOBAL,
    GRID,
    IMAGE,
    NEWLINE,
    PAD,
    PATCH,
    TILE,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
)

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
    """The files of one family.

    family: its name in tests/tiny
    names: the processor's names of special tokens, by token id
    processor: function that makes the processor from a tokenizer
    image, video: the chat template's text for one image or video
    roles: tokens that the processor reads from attributes of the tokenizer
    frames: numbers of frames of videos; empty where vLLM does not support video
    tower: prefix of the vision tower's weights in published checkpoints, where transformers 5
        writes another one
    differs: the differences between vLLM and transformers, for docs/vllm-models.md
    slow: whether only `make test-vllm-all` runs the family
    text: options of the config, or of its text config, that differ from those of tests/tiny
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
    text: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path, seed: int = 0) -> None:
        """Write config, weights, tokenizer, processor and chat template."""
        family = {**tiny.FAMILIES, **tiny.DECODERS}[self.family]
        config = wide(family.config())
        for name, value in self.text.items():
            for part in (config, config.get_text_config()):
                if hasattr(part, name):
                    setattr(part, name, value)
        family.build(seed, config).save_pretrained(folder)
        if self.tower:
            weights = load_file(folder / WEIGHTS)
            named = {name.replace("vision_tower.", self.tower): w for name, w in weights.items()}
            save_file(named, folder / WEIGHTS, {"format": "pt"})
        self.save_processor(folder)

    def save_processor(self, folder: Path) -> None:
        """Write tokenizer, processor and chat template."""
        processor = self.processor(tokenizer(self.names, self.roles))
        template = TEMPLATE.replace("IMAGE", self.image).replace("VIDEO", self.video)
        processor.chat_template = processor.tokenizer.chat_template = template
        processor.save_pretrained(folder)


def wide(config: Any) -> Any:
    """A copy of the config whose decoder has fewer heads with a larger head dimension."""
    text = config.get_text_config()
    text.num_attention_heads = HEADS
    text.head_dim = WIDTH
    if sections := text.rope_parameters.get("mrope_section"):
        doubled = [2 * width for width in sections]
        text.rope_parameters = text.rope_parameters | {"mrope_section": doubled}
    return config


def tokenizer(names: Mapping[int, str], roles: Mapping[str, str]) -> Any:
    """A tokenizer with one token per character, after the special tokens."""
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
            differs="every image is tiled; transformers leaves several of one prompt whole if they "
            "come in a list of their own; videos of different lengths in one step stop vLLM 0.32, "
            "pruned or not",
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

# Image tokens attend to each other in both directions, which CPU_ATTN does not compute.
GEMMA3 = Checkpoint(
    "gemma3",
    {
        IMAGE: "<image>",
        VISION_START: "<soi>",
        VISION_END: "<eoi>",
        **{token: "\n" * count for count, token in enumerate((NEWLINE, BREAK, GRID), 2)},
    },
    gemma3,
    "<soi>",
    roles={"boi_token": "<soi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    tower=SIGLIP,
)
