"""From lmms-eval's messages to a model's inputs, and its options to those of generate()."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import GenerationConfig

from plphp.errors import InputError
from plphp.inputs import Loaded, Prompt, Runnable, open_image, upright

Message = Mapping[str, Any]  # {"role": ..., "content": [{"type": "image", "url": ...}, ...]}
Chat = Sequence[Message]
Shrink = Callable[[Image.Image], Image.Image]

SAMPLING = ("temperature", "top_p", "top_k")
# lmms-eval adds this stop to every task that names none. It would cut an answer of two paragraphs.
ADDED_STOP = "\n\n"


def user_message(visuals: Sequence[Any] | None, text: str) -> Message:
    """One turn of the user: pictures and videos (paths), then the text."""
    kinds = ["image" if isinstance(v, Image.Image) else "video" for v in visuals or ()]
    media = [{"type": k, "url": v} for k, v in zip(kinds, visuals or (), strict=True)]
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def encode(
    loaded: Runnable, chats: Sequence[Chat], shrink: Shrink, frames: int
) -> dict[str, Tensor]:
    """Inputs of a batch of chats. Videos are read at `frames` frames.

    Raises InputError for media that the model cannot read.
    """
    read = [[_message(message, shrink) for message in chat] for chat in chats]
    if not isinstance(loaded, Loaded):
        return loaded.batch([_one_turn(chat) for chat in read])
    kinds = {entry["type"] for chat in read for message in chat for entry in message["content"]}
    options = {"num_frames": frames} if "video" in kinds else {}
    return loaded.encode_all(read, **options)


def _message(message: Message, shrink: Shrink) -> dict[str, Any]:
    content = message["content"]
    entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": message["role"], "content": [_entry(entry, shrink) for entry in entries]}


def _entry(entry: Mapping[str, Any], shrink: Shrink) -> dict[str, Any]:
    kind, medium = entry["type"], entry.get("url")
    if kind == "text":
        return {"type": "text", "text": entry["text"]}
    if kind == "image":
        image = upright(medium) if isinstance(medium, Image.Image) else open_image(str(medium))
        return {"type": "image", "image": shrink(image.convert("RGB"))}
    if kind == "video" and isinstance(medium, str):
        clip = [name for name in ("start_time", "end_time") if entry.get(name) is not None]
        if not clip:
            return {"type": "video", "path": medium}
        raise InputError("this task asks about a part of a video, which is not supported")
    raise InputError(
        f"{kind} as {type(medium).__name__} is not supported: pictures and video files"
    )


def _one_turn(chat: Chat) -> Prompt:
    """The embedded model reads one turn of pictures and a question, in this order."""
    entries = [entry for message in chat for entry in message["content"]]
    if len(chat) != 1 or any(entry["type"] == "video" for entry in entries):
        raise InputError("the embedded model reads one turn of pictures and a question")
    images = [entry["image"] for entry in entries if entry["type"] == "image"]
    return images, "\n".join(entry["text"] for entry in entries if entry["type"] == "text")


def at_most(pixels: int | None) -> Shrink:
    """A picture made smaller until it has at most so many pixels, its sides in proportion."""

    def shrink(image: Image.Image) -> Image.Image:
        if pixels is None or image.width * image.height <= pixels:
            return image
        scale = math.sqrt(pixels / (image.width * image.height))
        size = max(int(image.width * scale), 1), max(int(image.height * scale), 1)
        return image.resize(size, Image.Resampling.BICUBIC)

    return shrink


def generation(task: Mapping[str, Any]) -> dict[str, Any]:
    """A task's options for transformers' generate(): greedy unless a temperature asks for more.

    What generate() does not know (`until`, other models' settings) is left out, see `stops`.
    """
    known = vars(GenerationConfig())
    options = {name: value for name, value in task.items() if name in known}
    sampled = bool(options.pop("do_sample", options.get("temperature"))) and (
        options.get("temperature") != 0
    )
    if not sampled:  # None overrules what the model's own generation config says
        options |= dict.fromkeys(SAMPLING)
    return {"max_new_tokens": 128, **options, "do_sample": sampled}


def stops(task: Mapping[str, Any]) -> list[str]:
    """Texts at which a task ends an answer."""
    until = task.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop != ADDED_STOP]


def cut(text: str, stops: Sequence[str]) -> str:
    """What comes before the first stop."""
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)
