"""Makes the parts of a model directory: tokenizer, template, configuration, weights, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from plphp.demo.boards import COLOUR_NAMES, GLYPHS
from plphp.demo.questions import LEVELS, MIX, ask_all, draw_prompt, draw_size
from plphp.demo.wording import CHAT, LEADS, SYSTEM, TAILS
from training.easy_vqa import EasyVQA

END_OF_TEXT, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
SPECIAL_TOKENS = [
    END_OF_TEXT,
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
NUMBERS = list("12345678")
MOST_TOKENS = 8192  # the longest prompt: 4,000 vision tokens and the text around them
TEXT_LAYERS, VISION_BLOCKS = 8, 4
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text()
PROCESSOR = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 112 * 112,
    "max_pixels": 4096 * 28 * 28,
    "size": {"shortest_edge": 112 * 112, "longest_edge": 4096 * 28 * 28},
}


def make_tokenizer(easy: EasyVQA) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in which every word of the tasks is one token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=720,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(easy), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        extra_special_tokens=SPECIAL_TOKENS[1:],
        model_max_length=MOST_TOKENS,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    words = [
        *GLYPHS,
        *COLOUR_NAMES,
        *NUMBERS,
        "picture",
        "object",
        "answer",
        "rectangle",
        "yes",
        "no",
    ]
    split = [word for word in words if len(tokenizer.encode(f" {word}")) != 1]
    if split:
        raise ValueError(
            f"these words have more than one token, so they cannot be trained: {split}"
        )
    return tokenizer


def make_model(tokenizer: Any) -> Any:
    """The model with its initial weights, in float32."""
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(_config(tokenizer))
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.normal_(0, 0.06)
        _start_queries_like_keys(model)
    return model


def export(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model directory: weights in bfloat16, tokenizer, template and settings.

    ``model`` itself is converted to bfloat16.
    """
    model.to(torch.bfloat16)
    for config in (model.config.text_config, model.config.vision_config):
        config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(END_OF_TURN),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        do_sample=False,
        max_new_tokens=256,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for kind, prefix in (("image", ""), ("video", "video_")):
        settings = PROCESSOR | {
            f"{kind}_processor_type": f"Qwen2VL{kind.capitalize()}Processor",
            "processor_class": "Qwen2VLProcessor",
        }
        text = json.dumps(settings, indent=1)
        (folder / f"{prefix}preprocessor_config.json").write_text(text)


def _corpus(easy: EasyVQA, prompts: int = 2500) -> list[str]:
    rng = np.random.default_rng(5)
    hardest = LEVELS[-1]
    texts: list[str] = []
    for number in range(prompts):
        pictures, _ = draw_prompt(rng, hardest, *draw_size(rng, hardest), [])
        drawn = ask_all(rng, pictures, MIX, reworded=(number % 2) * 0.8)
        _, sampled = easy.sample(rng)
        for question in drawn + sampled:
            texts += [question.text, question.answer]
    talk = [*SYSTEM, *LEADS, *TAILS, *(text for turn in CHAT for text in turn)]
    texts += talk * 300
    texts += ["Picture 1:", "user\n", "assistant\n", "system\n"] * 300
    texts += [f" {word}" for word in [*GLYPHS, *COLOUR_NAMES, *NUMBERS]] * 400
    return texts


def _config(tokenizer: Any) -> Qwen2VLConfig:
    token = tokenizer.convert_tokens_to_ids
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": MOST_TOKENS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 300.0,  # prompts are short, so that long wavelengths would be useless
            "mrope_section": [2, 2, 12],
        },
        "bos_token_id": None,
        "eos_token_id": token(END_OF_TURN),
        "pad_token_id": token(END_OF_TEXT),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": VISION_BLOCKS,
        "embed_dim": 128,
        "num_heads": 4,
        "hidden_size": text["hidden_size"],
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _start_queries_like_keys(model: Any) -> None:
    """Make queries similar to keys, so that similar tokens attend to each other from the start.

    This follows Trockman & Kolter, 2023.
    """
    config = model.config.text_config
    size = config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    spread = config.hidden_size**-0.5
    for layer in model.model.language_model.layers:
        query, key = layer.self_attn.q_proj.weight.data, layer.self_attn.k_proj.weight.data
        key.normal_(0, spread)
        like_key = key.view(-1, size, config.hidden_size).repeat_interleave(group, 0)
        query.copy_(0.8 * like_key.reshape_as(query) + 0.6 * spread * torch.randn_like(query))
