"""Reads ``schedule.json``, which says what is trained for how long.

Each stage has its own optimizers. Its learning rate is interpolated linearly between factors that
are given at some steps. A phase lists only the settings that change, also from the stage before.
The stages under ``from_nothing`` are run first if the model does not begin with an older one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from plphp.demo.painting import Look
from plphp.demo.photographs import TRAINING
from plphp.demo.regimes import Regime

FILE = Path(__file__).parent / "schedule.json"


@dataclass(frozen=True)
class Phase:
    """The settings of steps, from step ``step`` of the stage on. Shares are shares of the steps."""

    step: int
    regime: Regime
    long: Regime  # the same regime with more vision tokens
    long_share: float  # share with a batch of `long`
    old_share: float  # share with a batch of LEVELS: things on paper that cover one token
    level_shares: tuple[float, ...]  # probability of each level
    easy_share: float  # share with an additional batch of easy-VQA
    easy_weight: float  # weight of the loss of that batch
    vision_share: float  # share in which the vision tower learns too
    words_weight: float  # weight of the loss of stage V in these steps
    crowd_share: float  # share with an additional batch of stage V, with the same weight
    probe_weight: float  # weight of the position probe's loss
    second_share: float  # share in which each question follows another one and its answer
    budget: int  # approximate number of tokens in a step
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Stage:
    kind: str  # vision or joint
    seed: int
    steps: int
    rate: float
    learning_rate: tuple[tuple[float, float], ...]  # (step, factor of the rate)
    phases: tuple[Phase, ...]

    def factor(self, step: int) -> float:
        at, factors = zip(*self.learning_rate, strict=True)
        return float(np.interp(step, at, factors))

    def phase(self, step: int) -> Phase:
        return [phase for phase in self.phases if phase.step <= step][-1]

    def scaled(self, scale: float) -> Stage:
        """The same stage with ``scale`` times as many steps."""
        return replace(
            self,
            steps=max(1, round(self.steps * scale)),
            learning_rate=tuple((step * scale, factor) for step, factor in self.learning_rate),
            phases=tuple(replace(p, step=round(p.step * scale)) for p in self.phases),
        )


def read(warm: bool, file: Path = FILE) -> list[Stage]:
    """The stages of training. warm: whether the model begins with the weights of an older one."""
    raw = json.loads(file.read_text())
    settings: dict[str, Any] = dict(raw["defaults"])
    stages = []
    for number, stage in enumerate(raw["from_nothing"] + raw["stages"]):
        phases = []
        for changes in stage["phases"]:
            settings |= {"step": 0} | changes
            phases.append(_phase(settings))
        if not warm or number >= len(raw["from_nothing"]):
            knots = tuple((step, factor) for step, factor in stage["learning_rate"])
            stages.append(Stage(*_head(stage), knots, tuple(phases)))
    return stages


def _head(stage: dict[str, Any]) -> tuple[str, int, int, float]:
    return stage["kind"], stage["seed"], stage["steps"], stage["rate"]


def _phase(settings: dict[str, Any]) -> Phase:
    fields = dict(settings)
    look = Look(TRAINING, **fields.pop("look"))
    most = int(fields.pop("most_tokens"))
    regime = Regime(look, **{name: _tuples(value) for name, value in fields.pop("regime").items()})
    return Phase(
        regime=regime,
        long=replace(regime, tokens=(regime.tokens[1], most)),
        level_shares=tuple(fields.pop("level_shares")),
        tasks=tuple(fields.pop("tasks").split()),
        **fields,
    )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
