"""A LLaVA of random weights on disk, with a real processor that needs no torchvision."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from plphp.demo.model import WEIGHTS

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}assistant:"
)


def save(folder: Path) -> None:
    """Pictures become 28 x 28 pixels and 16 tokens."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS, local_files_only=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "image_size": 28,
            "patch_size": 7,
            "num_hidden_layers": 2,
            **SIZES,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "num_hidden_layers": 3,
            "initializer_range": 0.3,
            "pad_token_id": tokenizer.pad_token_id,
            **SIZES,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
