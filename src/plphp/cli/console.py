"""Where commands write: tables on stdout, progress and errors on stderr, and how they end.

What is printed may hold text that is not ours: answers, paths, names. It is printed as it stands:
nothing of it is markup, and characters that would control the terminal are shown as escapes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from plphp.errors import InputError, PlphpError


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # rich itself would exit with 1


def stdout() -> Console:
    return _Console(markup=False, emoji=False, highlight=False)


def stderr() -> Console:
    return _Console(stderr=True, markup=False, emoji=False, highlight=False)


def progress(quiet: bool, **options: Any) -> Progress:
    """A bar on stderr. options: rich's own"""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr(), disable=quiet, **options)


def shown(text: object) -> str:
    """A text without characters that control a terminal: they stand as escapes, such as \\x1b."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else _escape(char) for char in str(text)
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: object) -> None:
    """A remark on stderr."""
    print(shown(text), file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What went wrong and what to do about it, on one line."""
    if _out_of_memory(error):
        return (
            "no memory left: use fewer or smaller images, --dtype bfloat16, a smaller model, or "
            "another --device"
        )
    format_message = getattr(error, "format_message", None)  # usage errors of the command line
    message = format_message() if format_message else str(error)
    named = type(error).__name__
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError, RecursionError)):
        message = f"{named}: {message}"  # written for programmers: it says nothing alone
    return shown(" ".join((message or named).split()))


def _out_of_memory(error: BaseException) -> bool:
    """By the kind of the error: a file may be called "out of memory.png"."""
    if isinstance(error, PlphpError) or not isinstance(error, (MemoryError, RuntimeError)):
        return False
    said = str(error).lower()
    return (
        isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
    )


class _Closed(io.TextIOBase):
    """Standard output that whoever started the command has closed."""

    def write(self, text: str) -> int:
        raise InputError("standard output is closed: redirect it, for example to a file")


def open_streams() -> None:
    """Make the standard streams safe to write to.

    A stream that is closed gets its number occupied, else the next file that is opened would be
    taken for it. A character that an encoding lacks is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = _Closed()
    if sys.stderr is None:  # print(file=None) would write to standard output
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """A command whose reader may leave early (head, less): that is no error."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:
            drop_output()
            raise typer.Exit(0) from None

    return guarded


def drop_output() -> None:
    """Throw away what is left to write: Python would complain about it at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
