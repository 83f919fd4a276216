"""`plphp generate --memory`: chooses, before the weights are loaded, what fits into a memory.

The bytes of weights and of keys and values are those of the model's own modules and cache on the
meta device, as in `plphp doctor`. The bytes that a prompt takes while it is read are an estimate
from the sizes of the linear layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from plphp.cli import options as o
from plphp.cli.bits import Bits
from plphp.cli.needs import RATES
from plphp.errors import InputError

if TYPE_CHECKING:
    from plphp.cli.needed import Needed, Sizes

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
WEIGHTS: tuple[Literal["int8", "int4"] | None, ...] = (None, "int8", "int4")  # the best first
# How to hold vision tokens, the best answers first (docs/accuracy.md), as options of generate.
# Recall and the recommended policy keep to a budget, and PLPHP's own rates follow the attention.
RECALL: tuple[dict[str, Any], ...] = (
    {"recall": "int4", "recall_budget": 0.4},
    {"recall": "int2", "recall_budget": 0.2},
)
CODES = tuple({"kv_bits": bits} for bits in (4, 2))
BUDGETS = tuple({"policy": "recommended", "budget": share} for share in ("0.4", "0.2", "0.1"))
HELD = (
    *RECALL,
    {**BUDGETS[0], **CODES[0]},
    *({**budget, **CODES[1]} for budget in BUDGETS),
)

Given = tuple[o.Method, Bits, o.Source]


@dataclass(frozen=True)
class Setup:
    """The options of a run, and the bytes that it takes.

    chosen: the options that were chosen here, by name
    """

    method: o.Method
    bits: Bits
    source: o.Source
    chosen: dict[str, Any]
    needed: Needed

    def __str__(self) -> str:
        said = [f"--{k.replace('_', '-')} {v}" for k, v in self.chosen.items() if v is not None]
        return f"{' '.join(said) or 'the options as given'} ({self.needed})"


def size_of(text: str) -> int:
    """The bytes of a size such as 4GiB or 900MB. Raises InputError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|B)?", text.strip().upper())
    if found is None:
        raise InputError(f"--memory {text}: give a size such as 4GiB or 900MB")
    if found[2] is None:
        raise InputError(f"--memory {text} has no unit: give a size such as 4GiB or 900MB")
    return int(float(found[1]) * UNITS[found[2]])


def fitted(
    memory: str,
    images: Sequence[str],
    videos: Sequence[str],
    prompt: str,
    new_tokens: int,
    given: Given,
) -> tuple[Setup, str]:
    """The best setup that fits into a memory, and in words why no better one does.

    memory: what the whole process may take, in words
    given: the options that were typed, which are not changed; --dtype is bfloat16 by default

    Raises InputError if nothing fits, and for another device than the CPU.
    """
    from plphp.cli.needed import Sizes

    limit, (method, bits, source) = size_of(memory), given
    if source.device != "cpu":
        raise InputError("--memory counts main memory, where the model must be: use --device cpu")
    sizes = Sizes.of(replace(source, dtype=_dtype(source)), images, videos, prompt, new_tokens)
    return best(limit, setups(sizes, (method, bits, source)))


def setups(sizes: Sizes, given: Given) -> list[Setup]:
    """All setups that do not change what was typed, the best answers first."""
    method, bits, source = given
    added = {} if source.dtype == _dtype(source) else {"dtype": _dtype(source)}
    source = replace(source, dtype=_dtype(source))
    return [
        Setup(
            one,
            codes,
            replace(source, weights=weights),
            {**added, **held, "weights": weights},
            needed,
        )
        for held, one, codes in _ways(method, bits)
        for weights in _weights(source)
        if (needed := sizes.needed(one, codes, weights)) is not None
    ]


def _dtype(source: o.Source) -> o.Dtype:
    """The number format: as typed, or bfloat16, in which weights can be rounded too."""
    return "bfloat16" if source.dtype == "auto" else source.dtype


def _weights(source: o.Source) -> Sequence[Literal["int8", "int4"] | None]:
    """What weights may be: as typed, and rounded in bfloat16 only."""
    if source.weights:
        return (source.weights,)
    return WEIGHTS if source.dtype == "bfloat16" else (None,)


def best(limit: int, every: Sequence[Setup]) -> tuple[Setup, str]:
    """The first setup that fits into so many bytes, and why. Raises InputError if none does."""
    from plphp.cli.needed import shown

    for number, setup in enumerate(every):
        if setup.needed.peak <= limit:
            before = f"; {every[number - 1]} does not fit" if number else ""
            return setup, f"for {shown(limit)}: {setup}{before}"
    least = min(every, key=lambda setup: setup.needed.peak)
    raise InputError(
        f"nothing fits into {shown(limit)}; the least is {least}: give fewer or smaller images, a "
        "smaller model, or more memory"
    )


def _ways(method: o.Method, bits: Bits) -> Iterator[tuple[dict[str, Any], o.Method, Bits]]:
    """The ways to hold vision tokens that do not change what was typed, the best answers first.

    Yields the options that were added, and all options.
    """
    named = method.policy != "plphp" or bool(method.settings)
    rates = set(method.settings) & set(RATES)  # with recall they would have no effect
    if method.recall is not None:
        ways: Sequence[dict[str, Any]] = [{}]
    elif bits.kv_bits is not None:
        ways = [{}] if named else BUDGETS
    else:
        ways = [*(() if rates else RECALL), *CODES] if named else HELD
    for way in ways:
        own = {name: value for name, value in way.items() if name != "kv_bits"}
        codes = replace(bits, kv_bits=way.get("kv_bits", bits.kv_bits))
        yield way, replace(method, **own), codes
