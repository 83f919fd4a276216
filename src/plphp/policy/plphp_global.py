"""PLPHP without "per image": one ranking over the vision tokens of all images of a prompt.

    keep = the top ceil(r_l |V| - 1e-6) of V = V_1 u ... u V_m by s[g, .]

An ablation of arXiv 2502.14504. An image that the last prompt token does not attend to may keep no
token. Without a number as its budget this policy equals `PLPHP(budget="global")`.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.errors import InputError
from plphp.policy.base import Scope
from plphp.policy.plphp import PLPHP


@dataclass(frozen=True)
class PLPHPGlobal(PLPHP):
    """PLPHP with one ranking over all images of a row. Options and errors are those of PLPHP.

    budget: "global", or a number as PLPHP's; "image" is refused
    """

    budget: Scope | float = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget == "image":
            raise InputError(
                "budget='image' ranks every image by itself: take policy 'plphp' for that"
            )

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"
