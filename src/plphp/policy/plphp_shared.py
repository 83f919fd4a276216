"""PLPHP without "per head": the layer rates of PLPHP, and one selection for all heads of a layer.

    s[j] = mean_h p[h, j]

An ablation of arXiv 2502.14504. It measures the effect of one selection per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from plphp.errors import InputError
from plphp.policy import steps
from plphp.policy.plphp import PLPHP
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class PLPHPShared(PLPHP):
    """PLPHP whose heads keep the same tokens. Options and errors as PLPHP's.

    gqa: "mean" only: there is one vote of all heads
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gqa != "mean":
            raise InputError(
                f"gqa={self.gqa!r} has no effect where all heads keep the same tokens: leave it "
                "out, or take policy 'plphp'"
            )

    def scores(self, view: LayerView) -> Tensor:
        return steps.shared_scores(view)
