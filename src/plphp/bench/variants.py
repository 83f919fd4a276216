"""What is measured: each way of keeping a prompt while an answer is written, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import cache_utils

from plphp.bench import caches
from plphp.bench.caches import Schedule, Setting
from plphp.errors import InputError
from plphp.hf import prune
from plphp.policy import POLICIES, CachePolicy, policy

DEFAULT = ("short",)
WORDS = {
    "short": "transformers' own growing cache of a prompt as short as what is kept",
    "static": "transformers' StaticCache, compiled",
    "pruned-static": "a static PrunedCache, compiled",
    "int4": "transformers' QuantizedCache of the whole prompt, 4 bits (optimum-quanto)",
    "fp8": "transformers' QuantizedCache of the whole prompt, 8-bit floats",
}
METHODS = [name for name in POLICIES if policy(name).prunes_cache and name != "full"]


@dataclass(frozen=True)
class Way:
    """One way of decoding: what to attach, how to make its cache, whether a step is compiled.

    policy: what prunes a prompt that is read this way, None for transformers' own
    """

    name: str
    make: Callable[[], Any]
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False
    policy: CachePolicy | None = None


def ways(
    model: Any, setting: Setting, rates: tuple[float, ...], room: int, against: Sequence[str]
) -> list[Way]:
    """The full stock cache, the pruned one, and whatever else was asked for.

    room: columns that an answer may take.
    """
    return [_named(name, model, setting, rates, room) for name in ("stock", "pruned", *against)]


def _named(name: str, model: Any, setting: Setting, rates: tuple[float, ...], room: int) -> Way:
    if name == "stock":
        return Way(name, lambda: caches.dynamic(model, setting, setting.context))
    if name == "short":
        kept = setting.kept(sum(rates) / len(rates))
        return Way(name, lambda: caches.dynamic(model, setting, kept))
    if name == "static":
        return Way(name, caches.static(model, setting, room), compiled=True)
    if name in ("int4", "fp8"):
        return Way(name, lambda: caches.quantized(model, setting, name))
    made = _policy(name, rates)
    if name == "pruned-static":
        make = caches.pruned_static(model, setting, made, room)
        return Way(name, make, _attached(model, setting, made), True, made)
    make = lambda: caches.pruned(model, setting, made)  # noqa: E731
    return Way(name, make, _attached(model, setting, made), False, made)


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for a way that does not exist, or not on this machine."""
    for name in names:
        if name not in WORDS and name not in METHODS:
            known = ", ".join([*WORDS, *METHODS])
            raise InputError(f"--against: unknown {name!r}; known are {known}")
    if "int4" in names and find_spec("optimum") is None:
        raise InputError("--against int4 needs optimum-quanto: pip install optimum-quanto")
    if "fp8" in names and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        raise InputError("--against fp8 needs a newer transformers: pip install -U transformers")


def _policy(name: str, rates: tuple[float, ...]) -> CachePolicy:
    if name in ("pruned", "pruned-static"):
        return Schedule(rates)
    made = policy(name, budget=sum(rates) / len(rates))
    assert isinstance(made, CachePolicy)
    return made


def _attached(
    model: Any, setting: Setting, made: CachePolicy
) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: prune(model, made, vision_mask=setting.spans())


def stepper(model: Any, way: Way, setting: Setting) -> Callable[..., Any]:
    """The forward of a way's steps; a compiled one replays a graph, on CUDA a captured one."""
    if not way.compiled:
        return model  # type: ignore[no-any-return]
    mode = "reduce-overhead" if setting.device.startswith("cuda") else "default"
    step: Callable[..., Any] = torch.compile(model.__call__, mode=mode, fullgraph=True)
    return step
