"""PLPHP without "per image": one ranking over the vision tokens of all images of a prompt.

    keep = the top ceil(r_l |V| - 1e-6) of V = V_1 u ... u V_m by s[g, .]

An ablation of arXiv 2502.14504: an image that the question is not about may keep nothing. Without a
number as its budget it is `PLPHP(budget="global")`.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy.base import Scope
from plphp.policy.plphp import PLPHP


@dataclass(frozen=True)
class PLPHPGlobal(PLPHP):
    """PLPHP that ranks all images together. Options and errors as PLPHP's.

    budget: "global", or a number as PLPHP's; "image" is refused
    """

    budget: Scope | float = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "image":
            raise ValueError(
                "budget='image' ranks every image by itself: take policy 'plphp' for that"
            )

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"
