"""A directory of images without labels: one prompt for all, scored by agreement only."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from plphp.errors import InputError
from plphp.eval.sample import Sample, Task
from plphp.inputs import image_files, open_image


def folder(images: Path, prompt: str) -> Task:
    """The task with the images of a directory, in an order that the seed determines.

    Raises InputError if the directory has no images.
    """
    if not images.is_dir():
        raise InputError(f"--images {images}: no such directory")
    files = image_files(images)
    if not files:
        raise InputError(f"--images {images}: there are no image files in this directory")

    def draw(count: int, seed: int) -> list[Sample]:
        order = np.random.default_rng([seed, 3]).permutation(len(files))[:count]
        return [Sample(files[i].name, (open_image(files[i]),), prompt) for i in order]

    what = " ".join(f"images of {images}, asked: {prompt.rstrip('.')}".split())
    return Task("folder", what, draw, metric=None)
