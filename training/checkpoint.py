"""A run that can be interrupted at any moment: its state in one file, replaced as a whole."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HORIZON = 0.998  # of the moving average of the weights: the last 500 steps, about


class Average:
    """A moving average of parameters, which answers better than the last step's."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.mean = [parameter.clone() for parameter in self.parameters]
        self.steps = 0

    def update(self) -> None:
        self.steps += 1
        keep = min(HORIZON, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.parameters, 1 - keep)

    def swap(self) -> None:
        """Exchange the average and the parameters; twice changes nothing."""
        for parameter, mean in zip(self.parameters, self.mean, strict=True):
            held = parameter.clone()
            parameter.copy_(mean)
            mean.copy_(held)

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        for mean, stored in zip(self.mean, state["mean"], strict=True):
            mean.copy_(stored)


class Scores(dict[str, tuple[float, float]]):
    """Running means by name: sum and weight of what was seen lately.

    Held out as to what is asked, since pictures are drawn afresh; not as to the photographs.
    """

    memory = 0.95

    def add(self, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            total, weight = self.get(name, (0.0, 0.0))
            self[name] = (total * self.memory + value, weight * self.memory + 1)

    def means(self) -> dict[str, float]:
        return {name: round(self[name][0] / self[name][1], 3) for name in sorted(self)}


def save(file: Path, state: dict[str, Any]) -> None:
    """Whoever reads ``file`` sees the old state or the new one, never half of it."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def read(file: Path) -> dict[str, Any] | None:
    """The last state saved, or None."""
    return torch.load(file, weights_only=False) if file.exists() else None
