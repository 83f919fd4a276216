"""Options that need another option, or that exclude one: an option without effect is refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperCommand

from plphp.errors import InputError

TYPED = "plphp.typed"

# Options that say how many tokens a policy keeps. With recall its own budget says that.
RATES = ("budget", "r", "delta_r", "min_tokens", "round_to")

# Options that have the same names in Python.
ALIKE = (*RATES, "alpha", "beta", "gqa", "kv_bits", "kv_text")

# Command -> option -> options, at least one of which must be given too.
NEEDS: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {
        "batch": ("out",),
        "out": ("batch",),
        "retry": ("batch",),
        "rounds": ("compare",),
        "seed": ("temperature", "top_p", "top_k"),
        "recall_budget": ("recall",),
        "kv_text": ("kv_bits",),
        "ray": ("batch",),
        "workers": ("ray",),
    },
    "demo": {"max_new_tokens": ("model", "image", "prompt")},
    "inspect": {"recall_budget": ("recall",), "prompt": ("image", "video")},
    "eval": {"images": ("prompt",), "prompt": ("images",), "workers": ("ray",)},
}

# Command -> option -> options that make it useless, so that both cannot be given.
WITHOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "generate": {
        "image": ("batch",),
        "video": ("batch",),
        "compare": ("batch",),
        "report": ("batch", "as_json"),
        "kv_bits": ("recall",),
        **dict.fromkeys(RATES, ("recall",)),
        "memory": ("batch", "compare"),
    },
    "demo": {"details": ("as_json",)},
    "inspect": {"policy": ("policies",), **dict.fromkeys(RATES, ("recall",))},
    "bench": {"shape": ("model",), "layers": ("model",), "weights": ("first_token",)},
    "eval": {"tasks": ("images",), "shard": ("ray",)},
}

# Options that may be given without a value, and the value that they have then.
ALONE = {"--ray": "local"}

# The reason, for options whose name does not give it.
WHY = {
    "out": "--out names the file for the answers of a batch",
    "batch": "--out names the file for the answers of the batch",
    "memory": "the choice depends on the images of one prompt, and holds for one cache",
    "seed": "an answer is greedy if no sampling option is given",
    "report": "--report prints a report after a single answer, and JSON always contains it",
    "max_new_tokens": "the bundled questions have answers of known lengths",
    "details": "--details prints more tables, and JSON always contains everything",
    "shape": "a model has its own shape",
    "layers": "all layers of a --model are measured",
    "images": "--prompt is the question about the images",
    "prompt": "--prompt is the question about the images",
    "tasks": "the images of --images are a task",
    "weights": "--first-token times a prompt, which reads the weights once for many tokens",
    "kv_bits": "--recall int4 has codes of its own, and --recall host keeps tokens in full",
    "ray": "a single answer cannot be divided among workers",
    "workers": "without --ray there is only one model",
    "shard": "--ray divides the run into shards itself",
    **dict.fromkeys(RATES, "the policy ranks the tokens, and --recall-budget says how many"),
    "policy": "--policies names all methods of the page",
}


class Command(TyperCommand):
    """A command that knows which options the user typed.

    An option that is typed twice is refused unless it may be repeated, because its first value
    would be lost.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = with_values(args)
        if self.name == "doctor":  # takes the model without an option; all others with --model
            args = [arg.removeprefix("--model=") for arg in args if arg != "--model"]
        order = self.make_parser(ctx).parse_args(args=list(args))[2]
        typed = [param.name for param in order]
        for param in order:
            repeats = getattr(param, "multiple", True) or param.nargs == -1
            harmless = getattr(param, "is_flag", False) and not param.secondary_opts
            if typed.count(param.name) > 1 and not (repeats or harmless):
                raise InputError(f"{param.opts[0]} is given twice: give it once")
        ctx.meta[TYPED] = {name for name in typed if name is not None}
        return list(super().parse_args(ctx, args))


def with_values(args: list[str]) -> list[str]:
    """The arguments with the values of options that stand alone: at the end, or before another."""
    pairs = zip(args, [*args[1:], "-"], strict=False)  # no arguments make no pair
    return [
        part
        for arg, following in pairs
        for part in ([arg, ALONE[arg]] if arg in ALONE and following.startswith("-") else [arg])
    ]


def check(ctx: typer.Context, values: Mapping[str, Any]) -> None:
    """Raise InputError for a typed option that has no effect with the other typed options."""
    command, typed = str(ctx.command.name), ctx.meta.get(TYPED, set())
    flags = {str(param.name): param.opts[0] for param in ctx.command.params}
    for name, others in WITHOUT.get(command, {}).items():
        for other in others:
            if {name, other} <= typed:
                _refuse(f"{flags[name]} cannot be used with {flags[other]}", name)
    for name, others in NEEDS.get(command, {}).items():
        if name in typed and not typed & set(others):
            _refuse(f"{flags[name]} needs {_either(flags, others)}", name)
    if "trust_remote_code" in typed and values.get("model") == "embedded":
        raise InputError("--trust-remote-code needs --model: the embedded model is plphp's own")


@contextlib.contextmanager
def in_words_of_a_shell() -> Iterator[None]:
    """Name options as a shell does in an error that begins with their names in Python.

    Policies and caches raise such errors: "kv_bits must be 4 or 2", "r + delta_r must be at most".
    """
    name = "|".join(ALIKE)
    try:
        yield
    except InputError as error:
        said = str(error)
        if re.match(rf"({name})( [-+] ({name}))* must\b", said):
            flags = re.sub(rf"(?<![\w'-])({name})(?![\w'-])", lambda found: _flag(found[0]), said)
            error.args = (flags,)
        raise


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _refuse(what: str, name: str) -> None:
    raise InputError(f"{what}: {WHY[name]}" if name in WHY else what)


def _either(flags: Mapping[str, str], names: Collection[str]) -> str:
    *some, last = (flags[name] for name in names)
    return f"{', '.join(some)} or {last}" if some else last
