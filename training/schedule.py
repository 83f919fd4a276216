"""How long what is trained: ``schedule.json``, read.

The vision stage is one leg; the joint stage is five, each with optimizers of its own. A leg's
learning rate is a factor given at some steps, with straight lines between them. A phase lists only
what changes, be it from the leg before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).parent / "schedule.json"


@dataclass(frozen=True)
class Phase:
    """What a step looks at, from step ``step`` of its leg on."""

    step: int
    level_shares: tuple[float, ...]  # how often each level is drawn
    easy_share: float  # how often a batch of easy-VQA joins in
    easy_weight: float  # of its loss
    vision_share: float  # how often the vision tower learns too
    probe_weight: float  # of the position probe's loss
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Leg:
    seed: int
    steps: int
    learning_rate: tuple[tuple[float, float], ...]  # (step, factor)
    phases: tuple[Phase, ...] = ()

    def factor(self, step: int) -> float:
        at, factors = zip(*self.learning_rate, strict=True)
        return float(np.interp(step, at, factors))

    def phase(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.step <= step][-1]

    def scaled(self, scale: float) -> Leg:
        """The same leg, ``scale`` times as long."""
        return replace(
            self,
            steps=max(1, round(self.steps * scale)),
            learning_rate=tuple((step * scale, factor) for step, factor in self.learning_rate),
            phases=tuple(replace(p, step=round(p.step * scale)) for p in self.phases),
        )


@dataclass(frozen=True)
class Schedule:
    vision: Leg
    joint: tuple[Leg, ...]

    def scaled(self, scale: float) -> Schedule:
        return Schedule(self.vision.scaled(scale), tuple(leg.scaled(scale) for leg in self.joint))


def read(file: Path = FILE) -> Schedule:
    raw = json.loads(file.read_text())
    settings: dict[str, Any] = {}
    joint = []
    for leg in raw["joint"]:
        phases = []
        for changes in leg["phases"]:
            settings |= changes
            phases.append(_phase(settings))
        joint.append(_leg(leg, tuple(phases)))
    return Schedule(_leg(raw["vision"], ()), tuple(joint))


def _phase(settings: dict[str, Any]) -> Phase:
    level_shares, tasks = tuple(settings["level_shares"]), tuple(settings["tasks"].split())
    return Phase(**(settings | {"level_shares": level_shares, "tasks": tasks}))


def _leg(raw: dict[str, Any], phases: tuple[Phase, ...]) -> Leg:
    knots = tuple((step, factor) for step, factor in raw["learning_rate"])
    return Leg(raw["seed"], raw["steps"], knots, phases)
