"""A model with what makes its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from plphp.demo.shown import Clip, Prompt
from plphp.demo.templates import with_template
from plphp.errors import InputError


class Runnable(Protocol):
    """A model that can make its own inputs from images and a question.

    inputs: the arguments of generate() for one prompt. Only the embedded model takes clips
    batch: the same for several prompts, padded on the left
    decode: the text of token ids, without special tokens
    """

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    def inputs(self, images: Sequence[Image.Image | Clip], question: str) -> dict[str, Tensor]: ...
    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]: ...
    def decode(self, ids: Tensor) -> str: ...


@dataclass(frozen=True)
class Loaded:
    """A model and its processor, as transformers loads them."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def inputs(
        self, images: Sequence[Image.Image | Clip], question: str, videos: Sequence[Path] = ()
    ) -> dict[str, Tensor]:
        """The arguments of `model.generate()` for one prompt, on the model's device.

        Raises InputError for a clip: its processor would sample the frames of a file.
        """
        return self.encode([_user(images, question, videos)])

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The arguments of generate() for several prompts, padded on the left."""
        return self.encode_all([[_user(images, question)] for images, question in prompts])

    def encode_all(self, chats: Sequence[list[Any]], **options: Any) -> dict[str, Tensor]:
        """The arguments of generate() for several chats, padded on the left.

        chats: each is a list of messages, in the form that chat templates take
        options: options of the processor
        """
        self.tokenizer.padding_side = "left"
        # A single prompt needs no padding, and some processors cannot pad.
        if len(chats) == 1:
            return self.encode(chats[0], **options)
        return self.encode(list(chats), padding=True, **options)

    def encode(self, chats: list[Any], **options: Any) -> dict[str, Tensor]:
        """The arguments of generate() for one chat, or for several of the same length.

        Raises InputError if the chat template cannot write the chats, and the processor's own
        errors for inputs that it refuses.
        """
        with with_template(self.model, self.processor, chats):
            encoded = self.processor.apply_chat_template(
                chats,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=options,
            )
        made: Mapping[str, Any] = encoded.to(self.model.device, dtype=self.model.dtype)
        return dict(made)

    def decode(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _user(
    images: Sequence[Image.Image | Clip], question: str, videos: Sequence[Path] = ()
) -> dict[str, Any]:
    if any(isinstance(image, tuple) for image in images):
        raise InputError("only the embedded model takes a video as a clip of frames")
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "path": str(path)} for path in videos]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}
