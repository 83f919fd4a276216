"""Makes the inputs of generate() from image files, video files and a question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from plphp._installed import decoding_fault, install_torchvision
from plphp._words import counted
from plphp.errors import InputError, UnsupportedModelError
from plphp.inputs.images import Still, open_image
from plphp.inputs.models import first_sentence, is_embedded, remedy
from plphp.inputs.runnable import Loaded, Runnable
from plphp.models import vision_spans
from plphp.models.spans import vision_token_ids

MARKS = ("image_token", "video_token")  # names that processors have for their placeholders


def make_inputs(
    loaded: Runnable, images: Sequence[Still], prompt: str, videos: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The arguments of the model's generate() for one prompt.

    images: files or open images, in the order of the prompt; videos: files
    Raises InputError for a file that cannot be used, for a prompt that is too long, if the model's
    processor leaves an image or a video out, and if it lacks a package or a file of its own.
    """
    check_prompt(loaded, prompt)
    pictures = [open_image(image) for image in images]
    names = [_name(image, number) for number, image in enumerate(images, 1)]
    if videos and not isinstance(loaded, Loaded):
        raise InputError(_no_videos(loaded))

    def encode(images: int, videos: Sequence[str]) -> dict[str, Tensor]:
        if videos and isinstance(loaded, Loaded):
            return loaded.inputs(pictures[:images], prompt, [Path(path) for path in videos])
        return loaded.inputs(pictures[:images], prompt)

    try:
        inputs = encode(len(pictures), videos)
        config = loaded.model.config
        if pictures and _images(config, inputs) < len(pictures) + len(videos):
            _check_more(config, inputs, encode(len(pictures) - 1, videos), names[-1])
        if videos:
            _check_more(config, inputs, encode(len(pictures), videos[:-1]), videos[-1])
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # processors and video readers raise errors of many kinds
        read = ", ".join([*names, *videos]) or "the prompt"
        raise InputError(_refusal(loaded, read, prompt, bool(videos), error)) from error
    _check_length(config, inputs, len(images))
    return inputs


def _refusal(loaded: Runnable, read: str, prompt: str, videos: bool, error: Exception) -> str:
    """The message for an error of a processor, which names what the error is about.

    read: the files of the prompt; videos: whether there are some among them
    """
    lacks = isinstance(error, (ImportError, AttributeError, OSError, RuntimeError))
    if videos and lacks and (fault := decoding_fault()):
        return f"{read}: {_decoding(fault)}"
    if isinstance(error, ImportError):
        what = f"{first_sentence(error)}: {remedy(error)}".removesuffix(": ")
        return f"{read} cannot be read, because a package is missing: {what}"
    try:
        loaded.inputs([], prompt)
    except Exception as alone:
        if str(alone) == str(error):
            name = getattr(loaded.model, "name_or_path", "") or "this model"
            return f"{name}: its processor refuses a prompt of text alone too: {error}"
    return f"{read}: the model's processor refuses it: {error}"


def _no_videos(loaded: Runnable) -> str:
    """Why a model reads no videos, although its processor takes them."""
    if is_embedded(loaded):
        return "the embedded model reads pictures, not videos: choose a --model"
    fault = decoding_fault()
    return (
        "this model needs torchvision to read videos, which is not installed: "
        f"{install_torchvision()}{f'; {_decoding(fault)}' if fault else ''}"
    )


def _decoding(fault: str) -> str:
    """What to do where videos cannot be decoded. fault: of torchcodec"""
    return f"videos are decoded by {fault}"


def _name(image: Still, number: int) -> str:
    """What a message calls an image, which is the `number`-th of its prompt."""
    return f"image {number}" if isinstance(image, Image.Image) else str(image)


def check_prompt(loaded: Runnable, prompt: str) -> None:
    """Raise InputError for a prompt that is empty, is no text, or contains image placeholders."""
    if not prompt.strip():
        raise InputError("the prompt is empty")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the prompt is not text: character {error.start} is half of a surrogate pair, or a "
            "byte that is not UTF-8"
        ) from None
    for mark in sorted(_marks(loaded)):
        if mark in prompt:
            raise InputError(
                f"the prompt contains {mark}, this model's placeholder for an image or a video: "
                "leave it out, because placeholders are added automatically"
            )


def _marks(loaded: Runnable) -> set[str]:
    """The placeholders that stand for an image or a video in the model's prompts."""
    holders = (getattr(loaded, "processor", None), loaded.tokenizer)
    found = {getattr(holder, name, None) for holder in holders for name in MARKS}
    ids = list(vision_token_ids(loaded.model.config))
    convert: Any = getattr(loaded.tokenizer, "convert_ids_to_tokens", None)
    if ids and convert is not None:
        found |= set(convert(ids))
    return {mark for mark in found if isinstance(mark, str) and mark.strip()}


def _images(config: Any, inputs: dict[str, Tensor]) -> int:
    """The number of images and videos in the prompt; 0 if it cannot be counted."""
    try:
        return int(vision_spans(config, **inputs).max())
    except UnsupportedModelError:
        return 0


def _vision(config: Any, inputs: dict[str, Tensor]) -> int:
    """The number of vision tokens in the prompt; all tokens if they cannot be distinguished."""
    try:
        return int((vision_spans(config, **inputs) > 0).sum())
    except UnsupportedModelError:
        return int(inputs["input_ids"].shape[1])


def _check_more(
    config: Any, inputs: dict[str, Tensor], fewer: dict[str, Tensor], name: str
) -> None:
    """Raise InputError if a prompt has no more vision tokens than the prompt without a file.

    fewer: the inputs without the file; name: the name of the file
    """
    if _vision(config, inputs) <= _vision(config, fewer):
        raise InputError(
            f"{name}: the model's processor leaves it out of the prompt, because this model cannot "
            "read such a file: give other files, or another --model"
        )


def _check_length(config: Any, inputs: dict[str, Tensor], images: int) -> None:
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if limit is not None and length >= limit:
        raise InputError(
            f"the prompt has {length} tokens with {counted(images, 'image')}, and the model reads "
            f"at most {limit}: use fewer or smaller images"
        )
