"""Images and videos of the page: scaled down and encoded as data URIs."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from plphp.inputs import Still, open_image

Media = Still | Sequence[Image.Image]  # an image, or the frames of a video

SIDE = 1024  # the longest side of an image on the page, in pixels
STRIP = 320  # the longest side of a video frame
BYTES = 900_000  # base64 bytes of one picture, so that a page of four stays below 5 MB


def size_of(media: Media) -> tuple[int, int]:
    """Width and height of the original in pixels."""
    return first_frame(media).size


def first_frame(media: Media) -> Image.Image:
    """The image, or the first frame of a video."""
    return _frames(media)[0]


def name_of(media: Media | None, number: int) -> str:
    """The name of the image file, or "picture" or "video" with its number."""
    if isinstance(media, (str, os.PathLike)):
        return Path(media).name
    kind = "video" if isinstance(media, (list, tuple)) else "picture"
    return f"{kind} {number}"


def data_uris(media: Media, frames: int) -> tuple[str, ...]:
    """The data URI of an image, or those of a video.

    frames: how many frames the tokens of a video distinguish
    """
    every = _frames(media)
    if len(every) == 1:
        return (data_uri(every[0], SIDE),)
    step = len(every) / frames
    return tuple(data_uri(every[int(i * step)], STRIP) for i in range(frames))


def data_uri(image: Image.Image, side: int) -> str:
    """The image as a data URI: PNG if that is small, as for drawings, otherwise JPEG."""
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
