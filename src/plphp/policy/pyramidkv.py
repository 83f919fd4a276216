"""PyramidKV (Cai et al. 2024, arXiv 2406.02069) for vision tokens: deeper layers keep fewer tokens.

    r_l = top + (bottom - top) * (1 - l / (L - 1)),  mean over layers = budget
    top = budget / slope, bottom = 2 budget - top;  where bottom would be above 1: bottom = 1 and
    top = 2 budget - 1

Layer 0 keeps the most tokens and the last layer the fewest. The scores are those of SnapKV.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.errors import InputError
from plphp.policy.snapkv import SnapKV
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a rate that falls linearly from the first layer to the last (arXiv 2406.02069).

    budget: the mean over layers of the share of vision tokens kept, 0 to 1
    window, kernel: as in SnapKV
    slope: budget divided by the rate of the last layer, at least 1; 1 gives all layers one rate
    Raises InputError, naming the field, for a value out of range.
    """

    slope: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.slope, (int, float)) and not isinstance(self.slope, bool)
        if not number or not 1 <= self.slope < 2**63:
            raise InputError(f"slope must be at least 1 and less than 2**63, got {self.slope!r}")

    @property
    def highest_rate(self) -> float:
        """The rate of the first layer."""
        return min(2 * self.budget - self.budget / self.slope, 1.0)

    def share(self, view: LayerView) -> float:
        bottom = self.highest_rate
        top = 2 * self.budget - bottom
        depth = view.layer / max(view.layers - 1, 1)
        return min(max(bottom + (top - bottom) * depth, 0.0), 1.0)
