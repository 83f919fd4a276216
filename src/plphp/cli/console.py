"""Where commands write: tables on stdout, progress and errors on stderr, and how they end."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # rich itself would exit with 1


def stdout() -> Console:
    return _Console()


def stderr() -> Console:
    return _Console(stderr=True)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose reader may leave early (head, less): that is no error."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            # Python would complain about what is left to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return guarded
