"""Any folder of images without labels: one prompt, asked of each, scored by agreement only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from plphp.errors import InputError
from plphp.eval.sample import Sample, Task
from plphp.inputs import open_image


def folder(images: Path, prompt: str) -> Task:
    """The images of a directory in an order drawn from the seed. Raises InputError for none."""
    if not images.is_dir():
        raise InputError(f"--images {images}: no such directory")
    known = Image.registered_extensions()
    files = sorted(path for path in images.iterdir() if path.suffix.lower() in known)
    if not files:
        raise InputError(f"--images {images}: no image files in this directory")

    def draw(count: int, seed: int) -> list[Sample]:
        order = np.random.default_rng([seed, 3]).permutation(len(files))[:count]
        return [Sample(files[i].name, (open_image(files[i]),), prompt) for i in order]

    return Task("folder", f"images of {images}, asked: {prompt}", draw, metric=None)
