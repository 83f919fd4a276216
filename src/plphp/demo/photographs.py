"""Photographs for the backgrounds of boards, from other installed packages.

scikit-image, scikit-learn and matplotlib contain a few photographs each. The files are read from
the directories of these packages, without an import or a download. The photographs for training and
the held-out ones have different names.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from plphp.errors import InputError

TRAINING = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/camera.png",
    "skimage/data/cell.png",
    "skimage/data/chelsea.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
)
HELD_OUT = (
    "skimage/data/clock_motion.png",
    "skimage/data/coffee.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/moon.png",
    "sklearn/datasets/images/flower.jpg",
)
SMALLEST_CROP = 96  # pixels per side; a crop that is too small is enlarged


@lru_cache
def photograph(name: str) -> Image.Image:
    """The photograph of this name, as RGB. Raises InputError if its package is not installed."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / rest).is_file():
        raise InputError(
            f"the photograph {name} was not found: run pip install scikit-image scikit-learn "
            "matplotlib"
        )
    return Image.open(folder / rest).convert("RGB")


def crop(rng: Generator, names: tuple[str, ...], high: int, wide: int) -> np.ndarray:
    """A random part of a random photograph, float32 [high, wide, 3] from 0 to 255.

    Half of the crops are mirrored.
    """
    source = photograph(names[int(rng.integers(len(names)))])
    fit = min(source.width / wide, source.height / high)
    least = min(1.0, SMALLEST_CROP / (fit * max(high, wide)))
    share = fit * float(rng.uniform(least, 1.0))
    size = (share * wide, share * high)
    left = float(rng.uniform(0, source.width - size[0]))
    top = float(rng.uniform(0, source.height - size[1]))
    box = (left, top, left + size[0], top + size[1])
    part = source.resize((wide, high), Image.Resampling.BILINEAR, box=box)
    pixels = np.asarray(part, np.float32)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels
