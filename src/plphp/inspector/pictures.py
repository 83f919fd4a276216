"""Images and videos as the page holds them: shrunk, and inside the file."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from plphp.inputs import open_image

Still = Image.Image | str | os.PathLike[str]
Media = Still | Sequence[Image.Image]  # an image, or the frames of a video

SIDE = 1024  # most pixels a side that the page holds of an image
STRIP = 320  # and of a frame of a video
BYTES = 900_000  # of one picture, so that four and their data stay under 5 MB


def size_of(media: Media) -> tuple[int, int]:
    """(width, height) in pixels of the original."""
    return first_frame(media).size


def first_frame(media: Media) -> Image.Image:
    """The image itself, or a video's first frame."""
    return _frames(media)[0]


def name_of(media: Media | None, number: int) -> str:
    """A file's name; pictures without one are numbered."""
    if isinstance(media, (str, os.PathLike)):
        return Path(media).name
    kind = "video" if isinstance(media, (list, tuple)) else "picture"
    return f"{kind} {number}"


def look(media: Media, frames: int) -> tuple[str, ...]:
    """Data URIs: the picture, or as many frames of a video as its tokens tell apart."""
    every = _frames(media)
    if len(every) == 1:
        return (data_uri(every[0], SIDE),)
    step = len(every) / frames
    return tuple(data_uri(every[int(i * step)], STRIP) for i in range(frames))


def data_uri(image: Image.Image, side: int) -> str:
    """The image inside a URI: PNG where that is small, as of drawings, else JPEG."""
    shown = image.convert("RGB")
    shown.thumbnail((side, side))
    png = _encoded(shown, "PNG", optimize=True)
    if len(png) <= 60_000:
        return _uri("png", png)
    for quality in (88, 75, 60):
        jpeg = _encoded(shown, "JPEG", quality=quality, optimize=True)
        if len(jpeg) <= BYTES * 3 // 4:
            break
    return _uri("jpeg", jpeg)


def _frames(media: Media) -> list[Image.Image]:
    if isinstance(media, Image.Image):
        return [media]
    if isinstance(media, (str, os.PathLike)):
        return [open_image(media)]
    return list(media)


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
