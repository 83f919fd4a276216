"""No pruning: the control that all policies are compared with. It runs through the same code."""

from __future__ import annotations

from dataclasses import dataclass

from plphp.errors import InputError
from plphp.policy import steps
from plphp.policy.base import CachePolicy, Look, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class Full(CachePolicy):
    """All tokens are kept. budget: 1; another value raises InputError."""

    budget: float = 1.0

    def __post_init__(self) -> None:
        if self.budget != 1:
            raise InputError(f"budget must be 1 for a full cache, got {self.budget!r}")

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.head_scores(view.probs, view.kv_heads), 1.0)
