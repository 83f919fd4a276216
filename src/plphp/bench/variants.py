"""The variants of the cache that a benchmark compares, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import cache_utils

from plphp._installed import bounds
from plphp.bench import caches
from plphp.bench.caches import Schedule, Setting
from plphp.errors import InputError
from plphp.hf import prune
from plphp.policy import POLICIES, CachePolicy, policy
from plphp.policy.checks import meant_name

DEFAULT = ("short",)
WORDS = {
    "short": "transformers' DynamicCache of a prompt that is as short as the pruned one",
    "static": "transformers' StaticCache, compiled",
    "pruned-static": "a static PrunedCache, compiled",
    "pruned-kv4": "what is kept in codes of 4 bits",
    "pruned-kv2": "what is kept in codes of 2 bits",
    "int4": "transformers' QuantizedCache of the whole prompt, 4 bits (optimum-quanto)",
    "fp8": "transformers' QuantizedCache of the whole prompt, 8-bit floats",
}
MEANINGS = {
    "stock": "transformers' DynamicCache of the whole prompt",
    "pruned": "plphp's cache of what is kept",
    **WORDS,
}
BITS = {"pruned-kv4": 4, "pruned-kv2": 2}
METHODS = [name for name in POLICIES if policy(name).prunes_cache and name != "full"]


@dataclass(frozen=True)
class Variant:
    """One variant of decoding.

    make: makes its cache, with a prompt in it
    attach: makes the context in which it runs
    compiled: whether its steps are compiled
    policy: the policy that prunes its prompts, None for transformers' caches
    """

    name: str
    make: Callable[[], Any]
    attach: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiled: bool = False
    policy: CachePolicy | None = None


def variants(
    model: Any,
    setting: Setting,
    rates: tuple[float, ...],
    answer_columns: int,
    against: Sequence[str],
) -> list[Variant]:
    """The variants "stock" and "pruned", and those that `against` names.

    answer_columns: columns that an answer may take
    """
    names = ("stock", "pruned", *against)
    return [_named(name, model, setting, rates, answer_columns) for name in names]


def _named(
    name: str, model: Any, setting: Setting, rates: tuple[float, ...], answer_columns: int
) -> Variant:
    if name == "stock":
        return Variant(name, lambda: caches.dynamic(model, setting, setting.context))
    if name == "short":
        kept = setting.kept(sum(rates) / len(rates))
        return Variant(name, lambda: caches.dynamic(model, setting, kept))
    if name == "static":
        return Variant(name, caches.static(model, setting, answer_columns), compiled=True)
    if name in ("int4", "fp8"):
        return Variant(name, lambda: caches.quantized(model, setting, name))
    made = _policy(name, rates)
    if name == "pruned-static":
        make = caches.pruned_static(model, setting, made, answer_columns)
        return Variant(name, make, _attached(model, setting, made), True, made)
    make = lambda: caches.pruned(model, setting, made)  # noqa: E731
    attach = _attached(model, setting, made, BITS.get(name))
    return Variant(name, make, attach, False, made)


def check_names(names: Sequence[str]) -> None:
    """Raise InputError for a variant that is unknown or that this machine cannot run."""
    for name in names:
        if name not in WORDS and name not in METHODS:
            known = ", ".join([*WORDS, *METHODS])
            meant = meant_name(name, [*WORDS, *METHODS])
            raise InputError(f"--against: unknown {name!r}{meant}; known are {known}")
    if "int4" in names and find_spec("optimum") is None:
        raise InputError("--against int4 needs optimum-quanto: pip install optimum-quanto")
    if "fp8" in names and not hasattr(cache_utils, "Fp8QuantizedLayer"):
        newest = f"pip install -U 'transformers{bounds('transformers')}'"
        raise InputError(f"--against fp8 needs a newer transformers: {newest}")


def _policy(name: str, rates: tuple[float, ...]) -> CachePolicy:
    if name.startswith("pruned"):
        return Schedule(rates)
    made = policy(name, budget=sum(rates) / len(rates))
    assert isinstance(made, CachePolicy)
    return made


def _attached(
    model: Any, setting: Setting, made: CachePolicy, bits: int | None = None
) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: prune(model, made, vision_mask=setting.spans(), kv_bits=bits)


def stepper(model: Any, variant: Variant, setting: Setting) -> Callable[..., Any]:
    """The forward of a variant's decoding steps, compiled (on CUDA with CUDA graphs) if it is."""
    if not variant.compiled:
        return model  # type: ignore[no-any-return]
    mode = "reduce-overhead" if setting.device.startswith("cuda") else "default"
    step: Callable[..., Any] = torch.compile(model.__call__, mode=mode, fullgraph=True)
    return step
