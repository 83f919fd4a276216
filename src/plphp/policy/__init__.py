"""WHAT to keep: pure tensor functions and small frozen dataclasses. Imports torch only."""

from __future__ import annotations

from typing import Any

from plphp.policy.plphp import PLPHP
from plphp.policy.view import LAYER_CLASSES, KeepPlan, LayerView, Policy

POLICIES: dict[str, Any] = {"plphp": PLPHP}

__all__ = ["LAYER_CLASSES", "PLPHP", "POLICIES", "KeepPlan", "LayerView", "Policy", "policy"]


def policy(name: str, **options: Any) -> Policy:
    """A policy by its name and its options: `policy("plphp", r=.3)`.

    Raises ValueError for an unknown name or option, and for a value out of range, naming it.
    """
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known are {', '.join(sorted(POLICIES))}")
    known = POLICIES[name].__dataclass_fields__
    for option in options:
        if option not in known:
            raise ValueError(f"policy {name!r} has no option {option!r}; it has {', '.join(known)}")
    made: Policy = POLICIES[name](**options)
    return made
