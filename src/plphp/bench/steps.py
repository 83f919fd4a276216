"""Decode steps side by side: A B A B, medians, spread, and the bytes that each must move."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from plphp.bench.caches import Setting
from plphp.bench.compare import cache_bytes
from plphp.bench.machine import energy_meter, resident_bytes, synchronize
from plphp.bench.variants import Way, stepper
from plphp.hf import compat

WARM = 2  # steps of every round that are not counted


@dataclass
class Measured:
    """One way, over all rounds.

    steps: seconds of each step, by round
    kv_bytes: allocated for the cache before the first step
    resident: bytes that the process or the device held then
    joules: a token, where the machine tells
    """

    name: str
    steps: list[list[float]] = field(default_factory=list)
    kv_bytes: int = 0
    resident: int | None = None
    joules: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median over rounds of their medians."""
        return median(median(steps) for steps in self.steps)

    def ratio(self, other: Measured) -> tuple[float, float, float]:
        """This over other, round by round: median, lowest, highest."""
        pairs = zip(self.steps, other.steps, strict=True)
        ratios = [median(mine) / median(theirs) for mine, theirs in pairs]
        return median(ratios), min(ratios), max(ratios)

    def spread(self) -> tuple[float, float]:
        """First and third quartile of all steps, in seconds."""
        every = [step for steps in self.steps for step in steps]
        if len(every) < 2:
            return every[0], every[0]
        low, _, high = quantiles(every, n=4)
        return low, high


def race(
    model: Any,
    setting: Setting,
    ways: Sequence[Way],
    new_tokens: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Let every way decode in turn, round after round, each on the cache of a fresh prompt.

    advance: called after every turn
    """
    found = [Measured(way.name) for way in ways]
    forwards = [stepper(model, way, setting) for way in ways]
    for _ in range(rounds):
        for way, forward, measured in zip(ways, forwards, found, strict=True):
            with way.attach(), torch.inference_mode():
                _turn(forward, setting, way.make(), new_tokens, measured)
            advance()
    return found


def _turn(
    forward: Callable[..., Any], setting: Setting, cache: Any, new_tokens: int, measured: Measured
) -> None:
    """Decode one answer. The cache is all that differs between the ways."""
    token = torch.ones(setting.batch, 1, dtype=torch.int64, device=setting.device)
    measured.kv_bytes = cache_bytes(cache)
    measured.resident = resident_bytes(setting.device)
    meter, _ = energy_meter(setting.device)
    steps, joules = [], 0.0
    position = setting.context
    for step in range(WARM + new_tokens):
        if step == WARM and meter is not None:
            joules = meter()
        places = torch.full_like(token, position + step)
        synchronize(setting.device)
        start = time.perf_counter()
        forward(input_ids=token, position_ids=places, use_cache=True, **{compat.CACHE: cache})
        synchronize(setting.device)
        steps.append(time.perf_counter() - start)
    if meter is not None:
        measured.joules.append((meter() - joules) / (new_tokens * setting.batch))
    measured.steps.append(steps[WARM:])


def bound_seconds(setting: Setting, kv_bytes: int, bandwidth: float) -> float:
    """What no step can beat: weights and live keys and values, moved once."""
    weights = setting.shape.parameters * setting.dtype.itemsize
    return (weights + kv_bytes) / bandwidth
