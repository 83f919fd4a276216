"""Options that several commands share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from plphp.cli import needs
from plphp.errors import InputError
from plphp.policy import Policy, policy

if TYPE_CHECKING:
    from plphp.cluster import Pool
    from plphp.inputs import Runnable
    from plphp.recall import Recall


@dataclass
class Asked:
    """What was asked of the command line as a whole; every context of a command holds it."""

    debug: bool = False


def _debug(ctx: typer.Context, wanted: bool) -> bool:
    if wanted and isinstance(ctx.obj, Asked):
        ctx.obj.debug = True
    return wanted


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_debug, is_eager=True, help="Show tracebacks and what libraries log."
    ),
]
MOST = 2**31 - 1  # of what is counted: tensors and loops hold no more
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST, help="Longest answer.")]
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


@dataclass(frozen=True)
class Method:
    """How to prune, as a user says it; None is the method's own default."""

    policy: PolicyName = "plphp"
    r: Rate = None
    delta_r: DeltaR = None
    alpha: Alpha = None
    beta: Beta = None
    budget: Budget = None
    gqa: Gqa = None
    min_tokens: MinTokens = None
    round_to: RoundTo = None
    recall: RecallHome = None
    recall_budget: RecallBudget = None

    @property
    def settings(self) -> dict[str, Any]:
        """What was said of the policy, its name left out."""
        said = vars(self).items()
        return {name: value for name, value in said if value is not None and name in _OF_POLICY}

    def chosen(self) -> Policy:
        return chosen_policy(self.policy, **self.settings)

    def parked(self) -> Recall | None:
        """Recall as it was asked for. Raises InputError for a budget without a home."""
        if self.recall is None:
            if self.recall_budget is not None:
                raise InputError("--recall-budget needs --recall host, int4 or int2")
            return None
        from plphp.recall import Recall, as_recall

        if self.recall_budget is None:
            return as_recall(self.recall)
        return Recall(self.recall, self.recall_budget)  # type: ignore[arg-type]


_OF_POLICY = {f.name for f in fields(Method)} - {"policy", "recall", "recall_budget"}


@dataclass(frozen=True)
class Source:
    """A model and how it is loaded."""

    model: Model = "embedded"
    dtype: Dtype = "auto"
    device: Device = "cpu"
    attn: Attention = None
    trust_remote_code: TrustRemoteCode = False

    def load(self) -> Runnable:
        from plphp.inputs import load

        return load(self.model, self.dtype, self.device, self.attn, self.trust_remote_code)


@dataclass(frozen=True)
class Sampling:
    """How an answer is written: greedily where nothing is said."""

    max_new_tokens: MaxNewTokens = 128
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature.")] = None
    top_p: Annotated[float | None, typer.Option(help="Sample from this probability mass.")] = None
    top_k: Annotated[int | None, typer.Option(max=MOST, help="Sample from this many tokens.")] = (
        None
    )
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Makes sampling repeatable.")
    ] = None

    def options(self) -> dict[str, Any]:
        """What generate() is told. Raises InputError for what cannot be sampled from."""
        given = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k")}
        said = {name: value for name, value in given.items() if value is not None}
        for name, value in said.items():
            most = 1 if name == "top_p" else None
            if not 0 < value < math.inf or (most is not None and value > most):
                bounds = "above 0" if most is None else f"above 0 and at most {most}"
                raise InputError(f"--{name.replace('_', '-')} must be {bounds}, got {value}")
        return {"max_new_tokens": self.max_new_tokens, "do_sample": bool(said), **said}


@dataclass(frozen=True)
class Cluster:
    """Whether the work is shared on Ray, where, and among how many."""

    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", help="Share the work on Ray: here, or at an address: auto, HOST:PORT."
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, max=MOST, help="Models side by side. [one a GPU or core]"),
    ] = None

    def pool(self, device: str) -> Pool | None:
        """The workers, or None without --ray. Raises InputError if Ray is missing, or for a
        device that workers cannot share."""
        if self.ray is None:
            return None
        from plphp.cluster import Pool

        return Pool(self.ray, self.workers, device)


def chosen_policy(name: str, **options: Any) -> Policy:
    """The policy with the options that were given; the others keep their own defaults."""
    given = {key: value for key, value in options.items() if value is not None}
    with contextlib.suppress(KeyError, ValueError):  # "image" and "global" are words
        given["budget"] = float(given["budget"])
    return policy(name, **given)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command that has an option for every field of the dataclasses it takes, and --debug.

    typer reads signatures: the fields are written into one. Options without an effect are refused.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if _is_group(kind)}

    @functools.wraps(command)
    def spread_out(ctx: typer.Context, debug: bool, **given: Any) -> None:
        if not (isinstance(ctx.obj, Asked) and ctx.obj.debug):
            _silence()
        needs.check(ctx, given)
        for name, kind in groups.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        command(**given)

    own = inspect.signature(command).parameters.values()
    parameters = [part for one in own for part in _parameters(one, hints[one.name])]
    added = {"ctx": (typer.Context, inspect.Parameter.empty), "debug": (Debug, False)}
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=kind)
        for name, (kind, value) in added.items()
    ]
    spread_out.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {part.name: part.annotation for part in parameters}
    return spread_out


def _silence() -> None:
    """transformers' advice is for programmers; a command's own lines are what a user reads."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def _parameters(one: inspect.Parameter, kind: Any) -> list[inspect.Parameter]:
    """A parameter of a command as typer shall see it, or one for every field of its dataclass."""
    if not _is_group(kind):
        return [one.replace(annotation=kind, kind=one.KEYWORD_ONLY)]
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(f.name, one.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(kind)
    ]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)
