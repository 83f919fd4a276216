"""The options that say in how many bits kept tokens and weights are stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import typer

KvBits = Annotated[
    int | None,
    typer.Option(
        "--kv-bits",
        help="Store the vision tokens that are kept in codes of so many bits a number: 4 or 2.",
    ),
]
KvText = Annotated[bool, typer.Option("--kv-text", help="With --kv-bits, store text in codes too.")]
Weights = Annotated[
    Literal["int8", "int4"] | None,
    typer.Option(
        "--weights",
        help="Round the weights while they are loaded: int8, or int4 in the decoder; the rest is "
        "bfloat16. On CPUs only.",
    ),
]


@dataclass(frozen=True)
class Bits:
    """The options that say how kept tokens are stored; the arguments of `plphp.prune`."""

    kv_bits: KvBits = None
    kv_text: KvText = False


def warn_of_prompts(weights: str | None) -> None:
    """Say on stderr where weights in 4 bits make the first token slower."""
    if weights != "int4":
        return
    from plphp.cli.console import say
    from plphp.weights import HAS_BFLOAT16

    if not HAS_BFLOAT16:
        say(
            "This processor has no bfloat16 units: with --weights int4 the first token comes later "
            "than with --dtype float32, and all others sooner."
        )
