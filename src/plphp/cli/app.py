"""The commands, and one contract for errors: a line on stderr, what to do, exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from plphp import __version__
from plphp.cli.demo import demo

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune the vision tokens of large vision-language models, layer by layer, head by head.",
)
app.command()(demo)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plphp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and what libraries log.")
    ] = False,
) -> None:
    """Options that every command shares."""
    if not debug:
        # transformers' advice is for programmers; a command's own lines are what a user reads.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")


def main() -> None:
    """Entry point of the `plphp` command."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has had enough (head, less): not an error. Python would
        # complain about the unflushed rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code = _fail(_one_line(error), 2)
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: Exception) -> str:
    """What went wrong and what to do about it, on one line."""
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return " ".join(str(message).split())


def _fail(message: str, code: int) -> int:
    print(f"plphp: {message}", file=sys.stderr)
    return code
