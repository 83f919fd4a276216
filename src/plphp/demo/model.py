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

from plphp.demo.shown import Clip, Prompt
from plphp.demo.templates import with_template
from plphp.weights import check_complete

WEIGHTS = Path(__file__).parent / "weights"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
IMAGE, VIDEO = 1, 2  # codes of mm_token_type_ids


@dataclass(frozen=True)
class Embedded:
    """The embedded model with its tokenizer and its image processor.

    A clip in the place of an image becomes a video, of which each frame is shown twice: the tower
    makes one frame of tokens from two frames of pixels, and was trained on doubled images.
    """

    model: Any  # transformers' decorators hide the type from type checkers
    tokenizer: Any
    image_processor: Any

    def inputs(self, images: Sequence[Image.Image | Clip], question: str) -> dict[str, Tensor]:
        """The arguments of ``model.generate(**inputs)`` for one prompt, with or without images."""
        return self.inputs_of(images, self._chat(len(images), question))

    def inputs_of(self, images: Sequence[Image.Image | Clip], text: str) -> dict[str, Tensor]:
        """The arguments for a text in the chat format, with one placeholder per image or clip."""
        seen = [self._pixels(shown) for shown in images]
        text = _expand_placeholders(text, [self._placeholders(one) for one in seen])
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        config = self.model.config
        tokens = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            # Without these, transformers uses 1-D positions and the answers are wrong, silently.
            "mm_token_type_ids": (
                IMAGE * (ids == config.image_token_id) + VIDEO * (ids == config.video_token_id)
            ).int(),
        }
        pixels = _joined(seen)
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
        return out | _joined([{k: v for k, v in row.items() if k not in padding} for row in rows])

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of one generated sequence, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _pixels(self, shown: Image.Image | Clip) -> dict[str, Tensor]:
        """The patches and the grid (1, 3) of an image or a clip."""
        if isinstance(shown, Image.Image):
            return dict(self.image_processor(images=[shown], return_tensors="pt"))
        found = self.image_processor(images=list(shown), return_tensors="pt")
        grid = found["image_grid_thw"][:1] * torch.tensor([len(shown), 1, 1])
        return {"pixel_values_videos": found["pixel_values"], "video_grid_thw": grid}

    def _placeholders(self, pixels: dict[str, Tensor]) -> str:
        """The placeholders of an image or a clip: one per vision token."""
        video = "video_grid_thw" in pixels
        grid = pixels["video_grid_thw" if video else "image_grid_thw"]
        tokens: int = int(grid.prod()) // self.image_processor.merge_size**2
        return (VIDEO_PAD if video else IMAGE_PAD) * tokens

    def _chat(self, pictures: int, question: str) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        with with_template(self.model, self.tokenizer, chat):
            text: str = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True
            )
        return text


def load(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", path: Path = WEIGHTS
) -> Embedded:
    """Load the embedded model, or one from ``training/``, without network access.

    path: directory of the weights, the tokenizer and the image processor

    Raises InputError if the files lack weights.
    """
    model, found = Qwen2VLForConditionalGeneration.from_pretrained(
        path, dtype=dtype, local_files_only=True, output_loading_info=True
    )
    check_complete(str(path), model, found)
    return Embedded(
        model=model.to(device).eval(),  # type: ignore[arg-type]
        tokenizer=AutoTokenizer.from_pretrained(path, local_files_only=True),
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True),
    )


def _expand_placeholders(text: str, pads: Sequence[str]) -> str:
    """Replace the placeholder of each image by its own.

    The chat template writes one placeholder per image; the model needs one per vision token.
    """
    before, *after = text.split(IMAGE_PAD)
    return before + "".join(pad + part for pad, part in zip(pads, after, strict=True))


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts by name, one after another."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: torch.cat([part[name] for part in parts if name in part]) for name in names}


def _pad_left(row: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (length - row.shape[1], 0), value=value)
