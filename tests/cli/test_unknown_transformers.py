"""A transformers without a seam to attach to ends a command in one line that blames the version."""

from collections.abc import Callable
from typing import Any

import pytest

from plphp.hf import compat


@pytest.mark.parametrize("command", ["generate", "demo", "doctor"])
def test_commands_blame_the_version(
    run: Callable[..., Any], picture: str, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(compat, "CACHE_NAMES", ("a_name_of_the_future",))
    given = {
        "generate": ("--image", picture, "--prompt", "describe picture 1."),
        "demo": ("--rounds", 1),
        "doctor": ("embedded",),
    }
    result = run(command, *given[command])
    assert (result.code, result.out) == (2, "")
    (line,) = result.err.strip().splitlines()
    assert line.startswith("plphp: plphp knows transformers ")
    assert f"pip install 'transformers{compat.BOUNDS}'" in line
