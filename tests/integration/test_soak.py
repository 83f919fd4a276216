"""Thousands of random generate() calls, some with exceptions: no wrong token, and no leak.

Each call draws a model, a prompt, a policy, a mode, and whether it fails on the way. The expected
tokens come from a model that was never attached before.
"""

import gc
import random
import resource
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import plphp
import tiny

FAMILIES = ("qwen2_vl", "llava", "llava_onevision", "idefics2")
PROMPTS = {
    "none": [tiny.RowSpec(images=0, text=12)],
    "one": [tiny.RowSpec(images=1, text=16)],
    "three": [tiny.RowSpec(images=3, text=24)],
    "batch": [tiny.RowSpec(images=i, text=16 + i) for i in (0, 1, 2)],
}
POLICIES = {
    "keep all": plphp.PLPHP(r=1, delta_r=0),
    "some": plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5),
    "rounded": plphp.PLPHP(r=0.3, delta_r=0.1, round_to=8, min_tokens=2),
    "global": plphp.PLPHP(r=0.2, delta_r=0, budget="global", gqa="max"),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.2},
    "beams": {"num_beams": 2},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 9},
    "static": {},
    "kept": {},
}


class Broken(RuntimeError):
    """An exception that the test raises on purpose."""


class Breaks(LogitsProcessor):
    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise Broken
        return scores


@dataclass
class Soak:
    """The tested models, and the expected answers found so far."""

    seed: int
    models: dict[str, Any] = field(default_factory=dict)
    answers: dict[tuple[str, ...], Tensor] = field(default_factory=dict)
    broken: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)
        self.models = {name: tiny.FAMILIES[name].build(0) for name in FAMILIES}

    def call(self) -> None:
        key = tuple(self.draw.choice(list(x)) for x in (FAMILIES, PROMPTS, POLICIES, MODES))
        model = self.models[key[0]]
        if self.draw.random() < 0.2:
            self.break_on_the_way(model, key)
        else:
            assert torch.equal(self.generate(model, key), self.answer(key)), key
        assert "generate" not in vars(model)
        assert not any(ours(module) for module in model.modules())

    def answer(self, key: tuple[str, ...]) -> Tensor:
        """The answer of a new model. Keep-all answers are those of a model that is not attached."""
        if key not in self.answers:
            name, prompt, policy, mode = key
            model = tiny.FAMILIES[name].build(0)
            if policy == "keep all":
                torch.manual_seed(0)
                options = {"max_new_tokens": 5, "do_sample": False, **MODES[mode]}
                self.answers[key] = model.generate(**self.inputs(name, prompt), **options)
            else:
                self.answers[key] = self.generate(model, key)
        return self.answers[key]

    def inputs(self, name: str, prompt: str) -> dict[str, Tensor]:
        made: dict[str, Tensor] = tiny.FAMILIES[name].make_inputs(
            self.models[name], PROMPTS[prompt], 0
        )[0]
        return made

    def generate(self, model: Any, key: tuple[str, ...], **more: Any) -> Tensor:
        name, prompt, policy, mode = key
        options = {"max_new_tokens": 5, "do_sample": False, **MODES[mode], **more}
        torch.manual_seed(0)
        with plphp.prune(model, POLICIES[policy]):
            if mode == "static":
                options["cache"] = plphp.PrunedCache(model, static=True, max_len=256)
            elif mode == "kept":
                options["cache"] = plphp.PrunedCache(model)
            out: Tensor = model.generate(**self.inputs(name, prompt), **options)
            return out

    def break_on_the_way(self, model: Any, key: tuple[str, ...]) -> None:
        """An exception in a layer of the prefill, or in a logits processor during decoding."""
        handle = None
        more: dict[str, Any] = {}
        if self.draw.random() < 0.5:
            layer = self.draw.choice(list(model.get_decoder().layers))

            def fail(*args: Any) -> None:
                raise Broken

            handle = layer.register_forward_hook(fail)
        else:
            more["logits_processor"] = LogitsProcessorList([Breaks(self.draw.randrange(4))])
        try:
            with pytest.raises(Broken):
                self.generate(model, key, **more)
        finally:
            if handle is not None:
                handle.remove()
        self.broken += 1


def ours(module: torch.nn.Module) -> bool:
    """Whether anything of plphp remains on a module; transformers has hooks of its own."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    left = [*hooks, *vars(module).values()]
    return any(type(x).__module__.startswith("plphp") for x in left) or any(
        getattr(hook, "__module__", "").startswith("plphp") for hook in hooks
    )


def alive() -> int:
    """Bytes of all tensors in the process."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def soak(calls: int, seed: int) -> None:
    run = Soak(seed)
    for key in [(f, p, q, m) for f in FAMILIES for p in PROMPTS for q in POLICIES for m in MODES]:
        if calls >= 1000:
            run.answer(key)  # so that no new expected answers are stored from here on
    bytes_before = None
    for number in range(calls):
        run.call()
        if number == calls // 4 and calls >= 1000:
            bytes_before = alive()
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert run.broken > calls // 10
    if bytes_before is not None:
        assert alive() <= bytes_before + 100_000
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        assert grown < 50_000, f"{grown} KiB more after {calls - calls // 4} calls"


@pytest.mark.filterwarnings("ignore:::transformers")
def test_a_short_soak() -> None:
    soak(calls=60, seed=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::transformers")
def test_two_thousand_calls() -> None:
    soak(calls=2000, seed=1)
