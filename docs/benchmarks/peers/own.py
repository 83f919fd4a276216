"""plphp's rounds: transformers' cache, the pruned one, and kept tokens in codes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from rounds import Moment, now, serve
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from plphp.bench.caches import TEXT, Schedule
from plphp.bench.ways import Way
from plphp.hf import prune
from plphp.inputs.rounding import frugal, loading_options, settle
from plphp.weights import BITS

KEPT = 0.4


def spans(ids: torch.Tensor) -> torch.Tensor:
    """All columns but a few at both ends are one image."""
    found = torch.ones_like(ids)
    found[:, : TEXT // 2] = found[:, -TEXT // 2 :] = 0
    return found


class Masked(Way):
    """A way whose vision tokens are given."""

    def attach(self, model: Any) -> Any:
        return prune(model, self.policy, vision_mask=spans, kv_bits=self.kv_bits)


class Clock(BaseStreamer):  # type: ignore[misc]
    """Records when each token came."""

    def __init__(self) -> None:
        self.times: list[Moment] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(now())

    def end(self) -> None:
        pass


def asked(model: Any, way: Way) -> Callable[[list[int], int], list[Moment]]:
    def ask(ids: list[int], new: int) -> list[Moment]:
        clock = Clock()
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        with torch.inference_mode(), way.attach(model):
            model.generate(input_ids=torch.tensor([ids]), streamer=clock, **options)
        return clock.times[1:]  # generate() passes the prompt first

    return ask


def main(folder: str, weights: str) -> None:
    dtype = torch.float32 if weights == "float32" else torch.bfloat16
    path, rounded = f"{folder}/hf", weights in BITS
    config = AutoConfig.from_pretrained(path)
    options = loading_options(config, BITS[weights]) if rounded else {}
    with frugal():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        if rounded:
            settle(model)
    model.generation_config.eos_token_id = None
    policy = Schedule((KEPT,))
    every = [Way("stock"), Masked("pruned", policy), Masked("pruned, 4 bits", policy, None, 4)]
    serve({way.name: asked(model, way) for way in every})


if __name__ == "__main__":
    main(*sys.argv[1:])
