"""Decoding steps of one batch of real prompts in several ways, measured in turn (A B A B)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from plphp.bench.machine import synchronize
from plphp.bench.ways import Way, cache_bytes
from plphp.hf import PrunedCache, compat
from plphp.hf.shared_prefill import SharedPrefill, read, read_into

WARM = 1  # steps at the start of each turn that are not counted


@dataclass
class Decoded:
    """The decoding steps of one way, and what its cache took before the first of them.

    on_device: share of the bytes of vision K/V that is on the device, 0 to 1
    kv_bytes: bytes allocated for the cache of the whole batch, without what is in main memory
    parked_bytes: bytes in main memory
    tokens: (B, 1) int64 of each step, the first token of the answer before them
    steps: for each round the seconds of its steps that count
    """

    way: Way
    on_device: float
    kv_bytes: int
    parked_bytes: int
    tokens: list[Tensor]
    steps: list[list[float]] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step: the median over the rounds of their medians."""
        return 1e3 * median(median(steps) for steps in self.steps)

    def ratio(self, other: Decoded) -> float:
        """The time of a step over that of another way: the median over the rounds."""
        pairs = zip(self.steps, other.steps, strict=True)
        return median(median(mine) / median(theirs) for mine, theirs in pairs)


def decode_in_turn(
    model: Any,
    inputs: Mapping[str, Tensor],
    ways: Sequence[Way],
    steps: int,
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Decoded]:
    """Read a batch of prompts once, make the caches of all ways from it, and decode in turn.

    A way with a sequence method reads the prompts by itself.

    model: one that is not attached
    inputs: arguments of the model's generate(), rows of equal length without padding
    steps: tokens that every way decodes in each round, greedily and each on its own cache
    advance: called after the prompt, and after each turn

    A step is one forward of the model. What generate() does besides is the same for all ways and
    is not part of it. Raises as `plphp.prune`.
    """
    with torch.inference_mode():
        windows = [way.policy.window for way in ways if way.policy is not None]
        prompt = read(model, inputs, max(windows, default=1))
        advance()
        found = [_Decoder(model, way, prompt, inputs) for way in ways]
        del prompt  # its unpruned cache and its views
        for _ in range(rounds):
            for decoder in found:
                decoder.turn(WARM, steps)
                advance()
    return [decoder.decoded for decoder in found]


class _Decoder:
    """A cache that has read the prompt, and what was decoded with it."""

    def __init__(
        self, model: Any, way: Way, prompt: SharedPrefill, inputs: Mapping[str, Tensor]
    ) -> None:
        self.model = model
        self.keyword = compat.cache_keyword(type(model).forward) or compat.CACHE
        with way.attach(model) as pruning:
            if pruning is None:
                self.cache = prompt.stock()
            elif way.policy is None or way.policy.prunes_cache:
                self.cache = prompt.pruned(pruning)
            else:  # it changes the forward of the prompt itself
                self.cache = PrunedCache(model)
                prompt = read_into(self.cache, model, inputs)
        report = self.cache.report if isinstance(self.cache, PrunedCache) else None
        parked = 0
        if report is not None and report.recall is not None and report.recall.home == "host":
            parked = report.recall.parked
        share = 1.0 if report is None else report.on_device
        self.decoded = Decoded(way, share, cache_bytes(self.cache), parked, [prompt.first])

    def turn(self, warm: int, steps: int) -> None:
        """Decode some tokens. The times of the first `warm` ones do not count."""
        tokens, seconds = self.decoded.tokens, []
        device = str(tokens[0].device)
        with self.decoded.way.attach(self.model):
            for _ in range(warm + steps):
                synchronize(device)
                start = time.perf_counter()
                out = self.model(input_ids=tokens[-1], **{self.keyword: self.cache})
                tokens.append(out.logits[:, -1:].argmax(-1))
                synchronize(device)
                seconds.append(time.perf_counter() - start)
        self.decoded.steps.append(seconds[warm:])
