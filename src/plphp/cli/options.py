"""Options that several commands share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plphp.errors import InputError
from plphp.policy import Policy, policy

if TYPE_CHECKING:
    from plphp.recall import Recall

PolicyName = Annotated[str, typer.Option("--policy", help="Pruning method.")]
Rate = Annotated[
    float | None, typer.Option("--r", help="Retention rate of vision-balanced layers. [0.4]")
]
DeltaR = Annotated[
    float | None, typer.Option("--delta-r", help="How much more or less other layers keep. [0.3]")
]
Alpha = Annotated[
    float | None,
    typer.Option("--alpha", help="Vision attention from which a layer is attentive. [0.25]"),
]
Beta = Annotated[
    float | None,
    typer.Option("--beta", help="Vision attention below which a layer is indifferent. [0.1]"),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", help="Share of the vision K/V kept, such as .2; for plphp also image, global."
    ),
]
Gqa = Annotated[
    str | None, typer.Option("--gqa", help="mean or max over the query heads of a KV head.")
]
MinTokens = Annotated[
    int | None, typer.Option("--min-tokens", help="Least tokens kept of each image.")
]
RoundTo = Annotated[
    int | None, typer.Option("--round-to", help="Drop tokens in multiples of this.")
]
RecallHome = Annotated[
    str | None,
    typer.Option("--recall", help="Park what is dropped and read it again: host, int4 or int2."),
]
RecallBudget = Annotated[
    float | None,
    typer.Option("--recall-budget", help="Device bytes of vision tokens, of the full ones. [0.4]"),
]
Model = Annotated[str, typer.Option("--model", help="'embedded', a local directory, or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="Number format; auto is what the weights have."),
]
Attention = Annotated[
    str | None, typer.Option("--attn", help="sdpa, eager, flash_attention_2, flex_attention, ...")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]


def chosen_policy(name: str, **options: Any) -> Policy:
    """The policy with the options that were given; the others keep their own defaults."""
    given = {key: value for key, value in options.items() if value is not None}
    with contextlib.suppress(KeyError, ValueError):  # "image" and "global" are words
        given["budget"] = float(given["budget"])
    return policy(name, **given)


def chosen_recall(home: str | None, budget: float | None) -> Recall | None:
    """Recall as it was asked for. Raises InputError for a budget without a home."""
    if home is None:
        if budget is not None:
            raise InputError("--recall-budget needs --recall host, int4 or int2")
        return None
    from plphp.recall import Recall

    return Recall(home) if budget is None else Recall(home, budget)  # type: ignore[arg-type]
