"""Files and a question, turned into what a generation needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from plphp.errors import InputError
from plphp.inputs.images import open_image
from plphp.inputs.models import Loaded, Runnable


def make_inputs(
    loaded: Runnable, images: Sequence[str], prompt: str, videos: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The model's inputs. Raises InputError for files, shapes and lengths that do not fit."""
    pictures = [open_image(path) for path in images]
    if not prompt.strip():
        raise InputError("the prompt is empty")
    try:
        if not videos:
            inputs = loaded.inputs(pictures, prompt)
        elif isinstance(loaded, Loaded):
            inputs = loaded.inputs(pictures, prompt, [Path(path) for path in videos])
        else:
            raise InputError("the embedded model reads pictures, not videos: choose a --model")
    except (ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        names = ", ".join([*images, *videos])
        raise InputError(f"{names}: the model's processor refuses: {error}") from error
    limit = getattr(
        loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    length = inputs["input_ids"].shape[1]
    if limit is not None and length >= limit:
        raise InputError(
            f"the prompt takes {length} tokens with {len(images)} images and the model holds "
            f"{limit}: use fewer or smaller images"
        )
    return inputs
