"""What is trained for how long: ``schedule.json``, read.

A stage has optimizers of its own. Its learning rate is a factor given at some steps, with straight
lines between them. A phase lists only what changes, be it from the stage before. The stages under
``from_nothing`` come first, where no older model is grown.
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
    """What a step looks at, from step ``step`` of its stage on."""

    step: int
    regime: Regime
    long: Regime  # the same, with more vision tokens
    long_share: float  # how often a batch is long
    old_share: float  # how often a batch is of LEVELS: a thing a token, on paper
    level_shares: tuple[float, ...]  # how often each of them
    easy_share: float  # how often a batch of easy-VQA joins in
    easy_weight: float  # of its loss
    vision_share: float  # how often the vision tower learns too
    words_weight: float  # then, of the loss of stage V
    crowd_share: float  # how often a batch of stage V joins in, with that weight
    probe_weight: float  # of the position probe's loss
    second_share: float  # how often every question stands behind another one
    budget: int  # tokens a step, about
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
        """The same with ``scale`` times as many steps."""
        return replace(
            self,
            steps=max(1, round(self.steps * scale)),
            learning_rate=tuple((step * scale, factor) for step, factor in self.learning_rate),
            phases=tuple(replace(p, step=round(p.step * scale)) for p in self.phases),
        )


def read(warm: bool, file: Path = FILE) -> list[Stage]:
    """The stages for a start from an older model (``warm``) or from nothing."""
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
