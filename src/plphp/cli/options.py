"""Options that several commands share."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from plphp._installed import untested
from plphp.cli import needs
from plphp.cli.bits import Weights, warn_of_prompts
from plphp.errors import InputError
from plphp.policy import Policy, policy

if TYPE_CHECKING:
    from plphp.inputs import Runnable
    from plphp.recall import Recall


@dataclass
class Asked:
    """The options that hold for the whole command line; the context of each command holds it."""

    debug: bool = False


def _debug(ctx: typer.Context, wanted: bool) -> bool:
    if wanted and isinstance(ctx.obj, Asked):
        ctx.obj.debug = True
    return wanted


Debug = Annotated[
    bool,
    typer.Option(
        "--debug", callback=_debug, is_eager=True, help="Show tracebacks and log messages."
    ),
]
MOST = 2**31 - 1  # the upper limit of counts, which tensors and loops can still hold
MaxNewTokens = Annotated[
    int, typer.Option(min=1, max=MOST, help="The largest number of tokens in an answer.")
]
PolicyName = Annotated[
    str,
    typer.Option(
        "--policy",
        help="The name of the pruning method. Two names make two stages: 'divprune,plphp', or "
        "'divprune:.25,plphp' with the share that the first leaves.",
    ),
]
Rate = Annotated[
    float | None,
    typer.Option(
        "--r",
        help="The share of its vision tokens that a vision-balanced layer keeps. PLPHP's default "
        "is 0.4.",
    ),
]
DeltaR = Annotated[
    float | None,
    typer.Option(
        "--delta-r",
        help="This is added to r for vision-attentive layers, and subtracted from r for "
        "vision-indifferent layers. PLPHP's default is 0.3.",
    ),
]
Alpha = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        help="A layer is vision-attentive if its vision attention is at least this. PLPHP's "
        "default is 0.25.",
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        "--beta",
        help="A layer is vision-indifferent if its vision attention is below this. PLPHP's "
        "default is 0.1.",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="The share of the vision K/V to keep, such as .2. PLPHP also takes a word: 'image' "
        "applies the rate to each image, 'global' ranks the tokens of all images together.",
    ),
]
Gqa = Annotated[
    str | None,
    typer.Option(
        "--gqa", help="How the scores of the query heads of a KV head are combined: mean or max."
    ),
]
MinTokens = Annotated[
    int | None,
    typer.Option("--min-tokens", help="The smallest number of tokens to keep of each image."),
]
RoundTo = Annotated[
    int | None,
    typer.Option("--round-to", help="Drop a multiple of this many tokens in each row."),
]
RecallHome = Annotated[
    str | None,
    typer.Option(
        "--recall", help="Park the dropped tokens and read them again: host, int4 or int2."
    ),
]
RecallBudget = Annotated[
    float | None,
    typer.Option(
        "--recall-budget",
        help="The limit on the device bytes of vision tokens, as a share of the full bytes. The "
        "default is 0.4.",
    ),
]
Model = Annotated[
    str, typer.Option("--model", help="The model: 'embedded', a local directory, or a hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Device = Annotated[
    str, typer.Option("--device", help="The torch device, such as cpu, cuda, cuda:1 or mps.")
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--dtype", help="The number format. 'auto' takes the format of the weights."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn",
        help="The attention implementation of transformers, such as sdpa, eager, "
        "flash_attention_2 or flex_attention.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that comes with the model."),
]


@dataclass(frozen=True)
class Method:
    """The options that say how to prune. None stands for the method's own default."""

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
        """The options of the policy that the user gave, without its name."""
        said = vars(self).items()
        return {name: value for name, value in said if value is not None and name in _OF_POLICY}

    def chosen(self) -> Policy:
        """The policy that these options describe. Raises ValueError for a wrong option."""
        return chosen_policy(self.policy, **self.settings)

    def parked(self) -> Recall | None:
        """The recall options, or None. Raises InputError for a budget without a home."""
        if self.recall is None:
            if self.recall_budget is not None:
                raise InputError("--recall-budget needs --recall host, int4 or int2")
            return None
        from plphp.recall import HOMES, Recall

        if self.recall not in HOMES:
            raise InputError(f"--recall {self.recall}: give {', '.join(HOMES)}")
        if self.recall_budget is None:
            return Recall(self.recall)
        try:
            return Recall(self.recall, self.recall_budget)
        except ValueError as error:
            said = f"--recall {self.recall} --recall-budget {self.recall_budget:g}"
            raise InputError(f"{said}: {error}") from None


_OF_POLICY = {f.name for f in fields(Method)} - {"policy", "recall", "recall_budget"}


@dataclass(frozen=True)
class Source:
    """The options that name a model and say how it is loaded."""

    model: Model = "embedded"
    dtype: Dtype = "auto"
    device: Device = "cpu"
    attn: Attention = None
    trust_remote_code: TrustRemoteCode = False
    weights: Weights = None

    def load(self) -> Runnable:
        from plphp.cli.console import loading, warn
        from plphp.inputs import load

        for note in untested():
            warn(note)
        trust, weights = self.trust_remote_code, self.weights
        warn_of_prompts(weights)
        with loading(self.model):
            return load(self.model, self.dtype, self.device, self.attn, trust, weights, warn)


def chosen_policy(name: str, **options: Any) -> Policy:
    """The policy with the options that were given; the others keep their own defaults."""
    given = {key: value for key, value in options.items() if value is not None}
    with contextlib.suppress(KeyError, ValueError):  # "image" and "global" are words
        given["budget"] = float(given["budget"])
    return policy(name, **given)


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The same command with one option per field of its dataclass parameters, and --debug.

    typer reads the signature of a function, so the fields become parameters of a new signature.
    Options that would have no effect are refused.
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
        with needs.in_words_of_a_shell():
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
    """Hide what transformers logs: its advice is for programmers, not for users of a command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def _parameters(one: inspect.Parameter, kind: Any) -> list[inspect.Parameter]:
    """The parameters that typer sees: the parameter itself, or one per field of its dataclass."""
    if not _is_group(kind):
        return [one.replace(annotation=kind, kind=one.KEYWORD_ONLY)]
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(f.name, one.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in fields(kind)
    ]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and is_dataclass(kind)
