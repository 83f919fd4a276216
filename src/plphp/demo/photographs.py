"""Photographs to lie behind the boards, from what other packages bundle; nothing is downloaded.

scikit-image, scikit-learn and matplotlib ship a few pictures each. Their files are read where
these packages lie: none is imported. Training and held-out photographs are apart, by name.
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
SMALLEST_CROP = 96  # px a side of the photograph, which is then enlarged


@lru_cache
def photograph(name: str) -> Image.Image:
    """One of the names above, as RGB. Raises InputError where its package is not installed."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / rest).is_file():
        raise InputError(
            f"photograph {name} not found: pip install scikit-image scikit-learn matplotlib"
        )
    return Image.open(folder / rest).convert("RGB")


def crop(rng: Generator, names: tuple[str, ...], high: int, wide: int) -> np.ndarray:
    """float32 [high, wide, 3], 0 to 255: some part of some photograph, mirrored half the time."""
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
