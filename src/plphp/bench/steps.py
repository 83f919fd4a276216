"""Decoding steps of several variants, measured in turn (A B A B)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from plphp.bench.caches import Setting
from plphp.bench.machine import energy_meter, resident_bytes, synchronize
from plphp.bench.variants import Variant, stepper
from plphp.bench.ways import cache_bytes
from plphp.hf import compat

WARM = 2  # steps at the start of each round that are not counted


@dataclass
class Measured:
    """The measurements of one variant over all rounds.

    steps: for each round the seconds of its steps
    kv_bytes: bytes allocated for the cache before the first step
    resident: bytes in use by the process or on the device at that time
    joules: for each round the joules per token; empty if the machine does not measure them
    cpu: for each round the CPU-seconds per token: those of all threads of the process
    """

    name: str
    steps: list[list[float]] = field(default_factory=list)
    kv_bytes: int = 0
    resident: int | None = None
    joules: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Seconds of a step: the median over the rounds of their medians."""
        return median(median(steps) for steps in self.steps)

    def ratio(self, other: Measured) -> tuple[float, float, float]:
        """Ratios of this variant's step to the other's by round: median, lowest, highest."""
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
    variants: Sequence[Variant],
    new_tokens: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Measure every variant once in each round, each time on a new cache.

    advance: called after each measurement
    """
    found = [Measured(variant.name) for variant in variants]
    forwards = [stepper(model, variant, setting) for variant in variants]
    for _ in range(rounds):
        for variant, forward, measured in zip(variants, forwards, found, strict=True):
            with variant.attach(), torch.inference_mode():
                _turn(forward, setting, variant.make(), new_tokens, measured)
            advance()
    return found


def _turn(
    forward: Callable[..., Any], setting: Setting, cache: Any, new_tokens: int, measured: Measured
) -> None:
    """Decode one answer, in the same way for all variants, and add its times to `measured`."""
    token = torch.ones(setting.batch, 1, dtype=torch.int64, device=setting.device)
    measured.kv_bytes = cache_bytes(cache)
    measured.resident = resident_bytes(setting.device)
    meter, _ = energy_meter(setting.device)
    steps, joules, cpu = [], 0.0, 0.0
    position = setting.context
    for step in range(WARM + new_tokens):
        if step == WARM:
            joules, cpu = meter() if meter else 0.0, time.process_time()
        places = torch.full_like(token, position + step)
        synchronize(setting.device)
        start = time.perf_counter()
        forward(input_ids=token, position_ids=places, use_cache=True, **{compat.CACHE: cache})
        synchronize(setting.device)
        steps.append(time.perf_counter() - start)
    tokens = new_tokens * setting.batch
    measured.cpu.append((time.process_time() - cpu) / tokens)
    if meter is not None:
        measured.joules.append((meter() - joules) / tokens)
    measured.steps.append(steps[WARM:])


def bound_seconds(setting: Setting, kv_bytes: int, bandwidth: float) -> float:
    """Seconds to move the weights and the live keys and values once."""
    return (setting.weights_read + kv_bytes) / bandwidth
