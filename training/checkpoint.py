"""The state of a training run, in one file, so that the run can be interrupted at any moment."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HORIZON = 0.998  # the decay of the average of the weights, which covers about the last 500 steps


class Average:
    """A moving average of parameters. It answers better than the parameters of the last step."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter.detach() for parameter in parameters]
        self.mean = [parameter.clone() for parameter in self.parameters]
        self.steps = 0

    def update(self) -> None:
        """Add the present parameters to the average."""
        self.steps += 1
        keep = min(HORIZON, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.mean, self.parameters, 1 - keep)

    def swap(self) -> None:
        """Exchange the average and the parameters. A second call restores both."""
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
    """Running means by name, as a weighted sum of the latest values and the sum of the weights.

    The scores are of new pictures and questions, because these are drawn for each step. The
    photographs behind them are those of training.
    """

    memory = 0.95

    def add(self, seen: dict[str, float]) -> None:
        for name, value in seen.items():
            total, weight = self.get(name, (0.0, 0.0))
            self[name] = (total * self.memory + value, weight * self.memory + 1)

    def means(self) -> dict[str, float]:
        return {name: round(self[name][0] / self[name][1], 3) for name in sorted(self)}


def save(file: Path, state: dict[str, Any]) -> None:
    """Write the state. A reader of ``file`` sees the old or the new state, never a part of one."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def read(file: Path) -> dict[str, Any] | None:
    """The last state that was saved, or None."""
    return torch.load(file, weights_only=False) if file.exists() else None
