"""What a prompt shows: images, and clips in the place of images."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

Clip = tuple[Image.Image, ...]  # the frames of a video, all of one size
Prompt = tuple[Sequence[Image.Image | Clip], str]  # the images, and the question about them
