"""How many numbers are converted at a time, so that copies in float32 stay small."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# 2 MiB in float32, which fit into the caches of two cores. On other devices fewer launches count
# for more than small copies.
BLOCK = 2**19
LAUNCH = 2**25


def at_once(x: Tensor, numbers: int) -> int:
    """How many items of this many numbers of x are converted at a time, at least 1."""
    return max(1, (BLOCK if x.device.type == "cpu" else LAUNCH) // max(numbers, 1))


def rows_in_block(numbers: int) -> int:
    """How many items of this many numbers are decoded at a time, at least 1, on every device."""
    return max(1, BLOCK // numbers)
