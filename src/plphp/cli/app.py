"""The commands, and one contract for errors: a line on stderr, what to do, exit code 2."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Annotated

import typer

from plphp._version import __version__
from plphp.cli.bench import bench
from plphp.cli.console import command
from plphp.cli.demo import demo
from plphp.cli.doctor import doctor
from plphp.cli.env import env
from plphp.cli.eval import evaluate
from plphp.cli.generate import generate
from plphp.cli.inspect import inspect
from plphp.cli.options import spread

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune the vision tokens of large vision-language models, layer by layer, head by head.",
)
for function in (demo, generate, inspect, bench, doctor, env):
    app.command()(command(spread(function)))
app.command("eval")(command(spread(evaluate)))


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
        logging.disable(logging.WARNING)
        warnings.filterwarnings("ignore")


def main() -> None:
    """Entry point of the `plphp` command."""
    debug = "--debug" in sys.argv
    if debug:  # wherever it stands
        sys.argv.remove("--debug")
        sys.argv.insert(1, "--debug")
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if debug:
            raise
        print(f"plphp: {one_line(error)}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def one_line(error: Exception) -> str:
    """What went wrong and what to do about it, on one line."""
    memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
    if memory or "can't allocate memory" in str(error):
        return (
            "no memory left: use fewer or smaller images, --dtype bfloat16, a smaller model, or "
            "another --device"
        )
    format_message = getattr(error, "format_message", None)  # usage errors of the command line
    message = format_message() if format_message else str(error)
    return " ".join((message or type(error).__name__).split())
