"""Generation with the full and the pruned cache in turn: answers, bytes and times."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from plphp.cache import allocated
from plphp.hf import PrunedCache, compat, prune
from plphp.policy import Policy
from plphp.recall import Recall
from plphp.report import Report


@dataclass(frozen=True)
class Timing:
    """The answer of one side of a comparison, and its times over all rounds.

    tokens: (T,) int64, the generated tokens
    first: for each round the seconds until the first token (vision tower and prefill)
    steps: seconds of every later token, of all rounds
    kv_bytes: bytes allocated for the cache right after the prefill
    """

    tokens: Tensor
    first: tuple[float, ...]
    steps: tuple[float, ...]
    kv_bytes: int

    @property
    def first_ms(self) -> float:
        """Milliseconds until the first token, the median of the rounds."""
        return 1e3 * median(self.first)

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a token after the first; NaN for an answer of one token."""
        return 1e3 * median(self.steps) if self.steps else float("nan")


@dataclass(frozen=True)
class Comparison:
    """One prompt with the full and the pruned cache, which took turns on one machine.

    report: the report of the last pruned round
    """

    full: Timing
    pruned: Timing
    report: Report


class Clock(BaseStreamer):  # type: ignore[misc]
    """A streamer that records the time of each token, and the cache's bytes at the first."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.times: list[float] = []
        self.kv_bytes = 0
        self.started = False

    def put(self, value: Tensor) -> None:
        if not self.started:  # generate() passes the prompt first
            self.started = True
            return
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.kv_bytes = cache_bytes(self.cache)

    def end(self) -> None:
        pass


Round = tuple[Tensor, Clock, float]  # the new tokens, their times, and the start time


def compare(
    model: Any,
    inputs: Mapping[str, Any],
    policy: Policy,
    rounds: int = 3,
    *,
    recall: Recall | None = None,
    **options: Any,
) -> Comparison:
    """Answer one prompt with the full and with the pruned cache in turn, and measure both.

    inputs: arguments of the model's generate(), one row
    rounds: how often each side is timed
    recall: where dropped tokens are parked; None frees them
    options: further arguments of generate(), for greedy answers. The streamer and the cache are
        set here

    A short round of both sides, which is not counted, comes first, because first calls are slower.
    Raises the errors of `plphp.prune` for a model that cannot be pruned.
    """
    _pair(model, inputs, policy, recall, {**options, "max_new_tokens": 2})
    pairs = [_pair(model, inputs, policy, recall, options) for _ in range(rounds)]
    return Comparison(
        full=_run([full for full, _, _ in pairs]),
        pruned=_run([pruned for _, pruned, _ in pairs]),
        report=pairs[-1][2],
    )


def _pair(
    model: Any,
    inputs: Mapping[str, Any],
    policy: Policy,
    recall: Recall | None,
    options: Mapping[str, Any],
) -> tuple[Round, Round, Report]:
    config = compat.text_config(model)
    full = _timed(model, inputs, DynamicCache(config=config), options)
    with prune(model, policy, recall=recall) as pruning:
        pruned = _timed(model, inputs, PrunedCache(model), options)
    assert pruning.report is not None
    return full, pruned, pruning.report


def _timed(model: Any, inputs: Mapping[str, Any], cache: Any, options: Mapping[str, Any]) -> Round:
    clock = Clock(cache)
    start = time.perf_counter()
    options = {**options, compat.CACHE: cache, "streamer": clock}
    out: Tensor = model.generate(**inputs, **options)
    return out[:, inputs["input_ids"].shape[1] :], clock, start


def _run(rounds: list[Round]) -> Timing:
    clocks = [clock for _, clock, _ in rounds]
    steps = [b - a for c in clocks for a, b in zip(c.times, c.times[1:], strict=False)]
    return Timing(
        tokens=rounds[-1][0][0],
        first=tuple(clock.times[0] - start for _, clock, start in rounds),
        steps=tuple(steps),
        kv_bytes=clocks[-1].kv_bytes,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes allocated for a `PrunedCache` or a cache of transformers."""
    if isinstance(cache, PrunedCache):
        return cache.kv_bytes()
    return allocated(tensor for layer in cache.layers for tensor in compat.held_tensors(layer))
