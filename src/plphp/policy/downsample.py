"""Downsampling: each image is made smaller, so that it takes fewer tokens. A control; no paper.

    (rows, columns) of tokens -> (rows', columns'),  rows' columns' <= ceil(budget rows columns)

The aspect ratio is kept as closely as whole tokens allow. Downsampling makes the prefill faster
too, and on many tasks it loses less than policies that prune the cache. A comparison of policies
should therefore include it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

from plphp.errors import InputError
from plphp.policy.base import Kind, Policy
from plphp.policy.checks import check_share


@dataclass(frozen=True)
class Downsample(Policy):
    """Smaller images.

    budget: the share of vision tokens kept, above 0 and at most 1
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        if self.budget == 0:
            raise InputError("budget must be above 0: a picture needs a token")

    @property
    def kind(self) -> Kind:
        return "images"

    def size(self, width: int, height: int, multiple: int) -> tuple[int, int]:
        """The size (width, height) in pixels of the smaller image.

        width, height: of the original, in pixels
        multiple: side of the square of pixels that makes one vision token
        """
        columns, rows = max(round(width / multiple), 1), max(round(height / multiple), 1)
        most = math.ceil(self.budget * rows * columns - 1e-6)
        shrink = math.sqrt(self.budget)
        near = [
            (max(across(columns * shrink), 1), max(down(rows * shrink), 1))
            for across, down in product((math.floor, math.ceil), repeat=2)
        ]
        fits = [(c, r) for c, r in near if c * r <= most]
        c, r = max(fits or [(1, 1)], key=lambda pair: pair[0] * pair[1])
        return c * multiple, r * multiple
