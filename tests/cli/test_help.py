"""The help of the commands: complete sentences, with the numbers and names that the code has."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import typer

from plphp import PLPHP, __version__
from plphp.bench.shapes import SHAPES
from plphp.cli.app import app
from plphp.recall import Recall

COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OPTIONS = [(name, one) for name in COMMANDS for one in COMMANDS[name].params]
DEFAULTS = {f.name: f.default for f in fields(PLPHP)} | {"recall_budget": Recall("host").budget}


def help_of(command: str, option: str) -> str:
    return next(str(one.help) for one in COMMANDS[command].params if one.name == option)


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda x: getattr(x, "name", x))
def test_help_is_a_sentence(command: str, option: Any) -> None:
    text = option.help
    assert text and text.endswith("."), f"{command} {option.name}: {text}"
    assert len(text.split()) >= 3, f"{command} {option.name}: {text}"
    assert "[" not in text, f"{command} {option.name}: rich reads brackets as markup"


# Integers that the code checks by what it knows: the depth of a shape, the range of an option.
CHECKED = {"layers", "min_tokens", "round_to", "kv_bits"}
INTEGERS = [
    (command, one)
    for command, one in OPTIONS
    if one.type_descriptor.annotation in (int, int | None) and not one.is_flag
]


@pytest.mark.parametrize(("command", "option"), INTEGERS, ids=lambda x: getattr(x, "name", x))
def test_an_integer_has_a_greatest_value(command: str, option: Any, run: Callable) -> None:
    """Without one, a huge number fails somewhere in torch, and the message blames a file."""
    assert option.max is not None or option.name in CHECKED
    needs = {"generate": ["--prompt", "x"], "eval": ["--out", "e"], "doctor": ["embedded"]}
    result = run(command, *needs.get(command, []), option.opts[0], 10**20)
    assert result.code == 2
    assert option.name in result.err.replace("-", "_")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does(name: str) -> None:
    assert COMMANDS[name].help.endswith(".")


@pytest.mark.parametrize("option", ["r", "delta_r", "alpha", "beta", "recall_budget"])
def test_help_names_the_default(option: str) -> None:
    assert help_of("generate", option).endswith(f"default is {DEFAULTS[option]}.")


def test_help_names_every_shape() -> None:
    assert all(name in help_of("bench", "shape") for name in SHAPES)


def test_the_package_runs_as_a_module() -> None:
    call = [sys.executable, "-m", "plphp", "--version"]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    assert done.stdout == f"plphp {__version__}\n"
