"""Where people wait, a terminal shows what is being done; a pipe or a file gets none of it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from plphp.cli import console

SHORT = ("--prompt", "describe picture 1.", "--max-new-tokens", 2)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal on stderr would show."""
    screen = io.StringIO()
    monkeypatch.setattr(
        console, "stderr", lambda: Console(file=screen, force_terminal=True, width=80)
    )
    return screen


def commands(picture: str, folder: Path) -> dict[str, tuple[object, ...]]:
    batch = folder / "in.jsonl"
    batch.write_text(json.dumps({"images": [picture], "prompt": "describe picture 1."}) + "\n")
    bench = ("bench", "--shape", "tiny", "--context", 64, "--rounds", 1, "--new-tokens", 2)
    out = ("--out", folder / "out.jsonl", "--max-new-tokens", 2)
    return {
        "loading the embedded model": ("generate", "--image", picture, *SHORT),
        "reading the prompt": ("generate", "--image", picture, *SHORT),
        "full and pruned in turn": ("generate", "--image", picture, *SHORT, "--compare"),
        "answering": ("generate", "--batch", batch, *out),
        "decoding on": bench,
    }


TEXTS = (
    "loading the embedded model",
    "reading the prompt",
    "full and pruned in turn",
    "answering",
    "decoding on",
)


@pytest.mark.parametrize("text", TEXTS)
def test_a_terminal_shows_what_is_being_done(
    text: str, run: Callable, picture: str, tmp_path: Path, terminal: io.StringIO
) -> None:
    result = run(*commands(picture, tmp_path)[text])
    assert result.code == 0, result.err
    assert text in terminal.getvalue()


@pytest.mark.parametrize("text", TEXTS)
def test_a_pipe_gets_none_of_it(text: str, run: Callable, picture: str, tmp_path: Path) -> None:
    result = run(*commands(picture, tmp_path)[text])
    assert result.code == 0, result.err
    for other in TEXTS:
        assert other not in result.err + result.out
    assert "━" not in result.err
