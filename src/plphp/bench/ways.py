"""Ways to hold the cache of a prompt, and generation in one of them: answer, bytes and times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from plphp.cache import allocated
from plphp.hf import PrunedCache, Pruning, compat, prune
from plphp.policy import Policy
from plphp.recall import Recall
from plphp.report import Report


@dataclass(frozen=True)
class Way:
    """One way to hold the keys and values of a prompt.

    name: what tables call it
    policy: what to keep; None for transformers' own cache, which keeps everything
    recall: where dropped tokens are parked; None frees them
    kv_bits, kv_text: as in `plphp.prune`
    """

    name: str
    policy: Policy | None = None
    recall: Recall | None = None
    kv_bits: int | None = None
    kv_text: bool = False

    def attach(self, model: Any) -> AbstractContextManager[Pruning | None]:
        """The context in which the model generates this way. Raises as `plphp.prune`."""
        if self.policy is None:
            return nullcontext()
        bits, text = self.kv_bits, self.kv_text
        return prune(model, self.policy, recall=self.recall, kv_bits=bits, kv_text=text)


@dataclass(frozen=True)
class Timing:
    """The answer of one way, and its times over all rounds.

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


class Round(NamedTuple):
    """One generation: the new tokens (B, T), their times, the start, and the report if pruned."""

    tokens: Tensor
    clock: Clock
    start: float
    report: Report | None


def generate(model: Any, inputs: Mapping[str, Any], way: Way, options: Mapping[str, Any]) -> Round:
    """Answer one prompt in one way, and measure it.

    inputs, options: arguments of the model's generate(), one row; options without a streamer and
        a cache
    """
    with way.attach(model) as pruning:
        if pruning is None:
            cache: Any = DynamicCache(config=compat.text_config(model))
        else:
            cache = PrunedCache(model)
        clock = Clock(cache)
        start = time.perf_counter()
        out = model.generate(**inputs, **{**options, compat.CACHE: cache, "streamer": clock})
    report = None if pruning is None else pruning.report
    return Round(out[:, inputs["input_ids"].shape[1] :], clock, start, report)


def timing(rounds: Sequence[Round]) -> Timing:
    """The times of several rounds of one prompt in one way, with the answer of the last."""
    clocks = [one.clock for one in rounds]
    steps = [b - a for c in clocks for a, b in zip(c.times, c.times[1:], strict=False)]
    return Timing(
        tokens=rounds[-1].tokens[0],
        first=tuple(one.clock.times[0] - one.start for one in rounds),
        steps=tuple(steps),
        kv_bytes=clocks[-1].kv_bytes,
    )


def cache_bytes(cache: Any) -> int:
    """Bytes allocated for a `PrunedCache` or a cache of transformers."""
    if isinstance(cache, PrunedCache):
        return cache.kv_bytes()
    return allocated(tensor for layer in cache.layers for tensor in compat.held_tensors(layer))
