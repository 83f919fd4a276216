"""A question about the demo's pictures, and an independent look at what a model then does."""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import plphp.demo
from plphp.demo.model import Embedded

PICTURES = Path(plphp.demo.__file__).parent / "pictures"
QUESTION = "what is brown in picture 1?"


def asked(embedded: Embedded, count: int = 2) -> tuple[list[Image.Image], dict[str, Any]]:
    paths = [PICTURES / f"a{number}.png" for number in range(1, count + 1)]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return pictures, embedded.inputs(pictures, QUESTION)


def bits(text: str, count: int) -> list[int]:
    every = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
    return np.flatnonzero(every[:count]).tolist()


def eager_attention(model: Any, inputs: dict[str, Any], answer: torch.Tensor) -> list[Any]:
    """Attention (H, T, N) of each layer, of the last prompt token and all answered but the last.

    By transformers' own eager code, on the untouched model.
    """
    ids = torch.cat([inputs["input_ids"], answer[None, :-1]], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer) - 1))
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = model(**{**inputs, **more}, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return [layer[0, :, -len(answer) :] for layer in out.attentions]
