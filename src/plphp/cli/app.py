"""The commands. Every error is one line on stderr that says what to do, with exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from plphp._version import __version__
from plphp.cli import needs
from plphp.cli import options as o
from plphp.cli.bench import bench
from plphp.cli.console import command, drop_output, one_line, open_streams, say
from plphp.cli.demo import demo
from plphp.cli.doctor import doctor
from plphp.cli.env import env
from plphp.cli.eval import evaluate
from plphp.cli.generate import generate
from plphp.cli.inspect import inspect

app = typer.Typer(
    add_completion=False,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    help="Prune the vision tokens of vision-language models, per layer and per head.",
)
for function in (demo, generate, inspect, bench, doctor, env):
    app.command(cls=needs.Command)(command(o.spread(function)))
app.command("eval", cls=needs.Command)(command(o.spread(evaluate)))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plphp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: o.Debug = False,
) -> None:
    """Prune the vision tokens of vision-language models, per layer and per head."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit


def main() -> int:
    """Run the command that the arguments ask for; returns the exit code."""
    open_streams()
    asked = o.Asked()
    try:
        code = app(standalone_mode=False, obj=asked)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        drop_output()
        return 0
    except Exception as error:
        if asked.debug:
            raise
        if isinstance(error, OSError):
            drop_output()
        say(f"plphp: {one_line(error)}")
        return 2
