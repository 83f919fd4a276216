"""The embedded model: a 7.0M-parameter Qwen2-VL for images of coloured letters and shapes.

It reads 1 to 8 images of 112 to 1,120 px a side, on plain paper or on photographs.
``training/README.md`` lists the questions it was trained on, and ``questions.json`` has examples.
Questions are in lower case, except for letters that the images show ("what color is the K?").

``AutoProcessor`` needs torchvision, although only its video part uses it. Therefore the tokenizer
and the PIL image processor are loaded separately here. All machines then compute the same pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_PAD = "<|image_pad|>"

Prompt = tuple[Sequence[Image.Image], str]  # the images and the question about them


@dataclass(frozen=True)
class Embedded:
    """The embedded model with its tokenizer and its image processor."""

    model: Any  # transformers' decorators hide the type from type checkers
    tokenizer: Any
    image_processor: Any

    def inputs(self, images: Sequence[Image.Image], question: str) -> dict[str, Tensor]:
        """The arguments of ``model.generate(**inputs)`` for one prompt, with or without images."""
        return self.inputs_of(images, self._chat(len(images), question))

    def inputs_of(self, images: Sequence[Image.Image], text: str) -> dict[str, Tensor]:
        """The arguments for a text in the chat format, with one placeholder per image."""
        pixels = self._pixels(images)
        merged = self.image_processor.merge_size**2
        sizes = [int(grid.prod()) // merged for grid in pixels.get("image_grid_thw", ())]
        text = _expand_placeholders(text, sizes)
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        tokens = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            # Without these, transformers uses 1-D positions and the answers are wrong, silently.
            "mm_token_type_ids": (ids == self.model.config.image_token_id).int(),
        }
        return {name: tensor.to(self.model.device) for name, tensor in (tokens | pixels).items()}

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The arguments for several prompts, padded on the left; images in the order of rows."""
        rows = [self.inputs(images, question) for images, question in prompts]
        length = max(row["input_ids"].shape[1] for row in rows)
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "mm_token_type_ids": 0,
        }
        out = {
            name: torch.cat([_pad_left(row[name], length, value) for row in rows])
            for name, value in padding.items()
        }
        for name in ("pixel_values", "image_grid_thw"):
            found = [row[name] for row in rows if name in row]
            if found:
                out[name] = torch.cat(found)
        return out

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one generated sequence, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _pixels(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        if not images:
            return {}
        return dict(self.image_processor(images=list(images), return_tensors="pt"))

    def _chat(self, pictures: int, question: str) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        text: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", path: Path = WEIGHTS
) -> Embedded:
    """Load the embedded model, or one from ``training/``, without network access.

    path: directory of the weights, the tokenizer and the image processor
    """
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, local_files_only=True
    )
    return Embedded(
        model=model.to(device).eval(),  # type: ignore[arg-type]
        tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True),
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True),
    )


def _expand_placeholders(text: str, sizes: Sequence[int]) -> str:
    """Replace each image's placeholder by as many as it has vision tokens.

    The chat template writes one placeholder per image; the model needs one per vision token.
    """
    before, *after = text.split(IMAGE_PAD)
    return before + "".join(
        IMAGE_PAD * size + part for size, part in zip(sizes, after, strict=True)
    )


def _pad_left(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=value)
