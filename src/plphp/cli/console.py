"""Output of the commands: tables on stdout, progress and errors on stderr.

Answers, paths and names come from outside of plphp. They are printed unchanged and never read as
markup, but characters that would control the terminal are printed as escapes.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from plphp._installed import misfit_behind
from plphp.errors import InputError, PlphpError


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # without this, rich exits with code 1


def stdout() -> Console:
    """A console on stdout that reads no markup."""
    return _Console(markup=False, emoji=False, highlight=False)


def stderr() -> Console:
    """A console on stderr that reads no markup."""
    return _Console(stderr=True, markup=False, emoji=False, highlight=False)


def progress(quiet: bool, **options: Any) -> Progress:
    """A progress bar on stderr, if that is a terminal. options: those of rich's `Progress`"""
    console = stderr()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, **options)


@contextlib.contextmanager
def waiting(text: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """Show a text with a spinner on stderr, if that is a terminal, until the block ends.

    Yields a function that shows another text, or with an empty text ends the display early.
    """
    console = stderr()
    if quiet or not console.is_terminal:
        yield lambda text: None
        return
    with console.status(Text(shown(text))) as status:
        yield lambda text: status.update(Text(shown(text))) if text else status.stop()


@contextlib.contextmanager
def resumable(told: Callable[[], str]) -> Iterator[None]:
    """After an interrupt in the block, print where its work can go on."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"plphp: interrupted: {told()}")
        raise


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Show on a terminal that a model is being loaded.

    A model from files gets one line, because transformers then shows bars of its own.
    """
    if model == "embedded":
        with waiting("loading the embedded model"):
            yield
        return
    if stderr().is_terminal:
        say(f"loading {model}")
    yield


def streamer(tokenizer: Any, begin: Callable[[], None]) -> Any:
    """A streamer that prints an answer, with escapes for characters that control the terminal.

    begin: is called before a text is printed
    """
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            begin()
            super().on_finalized_text(shown(text), stream_end)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)


def shown(text: object) -> str:
    """The text with escapes such as \\x1b in place of characters that control a terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else _escape(char) for char in str(text)
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def say(text: object) -> None:
    """Print a line on stderr."""
    print(shown(text), file=sys.stderr)


def warn(text: object) -> None:
    """Print a warning on stderr, for what does not stop a command."""
    say(f"warning: {text}")


def one_line(error: BaseException) -> str:
    """What went wrong and what the user can do, on one line."""
    if _out_of_memory(error):
        return (
            "there is no memory left: use fewer or smaller images, --dtype bfloat16, a smaller "
            "model, or another --device"
        )
    if isinstance(error, ImportError) and (wrong := misfit_behind(error)):
        return wrong
    format_message = getattr(error, "format_message", None)  # usage errors of the command line
    message = format_message() if format_message else str(error)
    message = message.replace(": Value error, ", ": ", 1)  # pydantic's words before a reason
    if message.startswith("Got unexpected extra argument"):
        message += ": every value needs its option, such as --model NAME or --image FILE"
    named = type(error).__name__
    if isinstance(error, (KeyError, IndexError, AttributeError, TypeError, RecursionError)):
        message = f"{named}: {message}"  # such a message says nothing without the error's name
    if type(error) is RuntimeError:
        message = f"torch failed: {message}; plphp --debug COMMAND ... shows where"
    return shown(" ".join((message or named).split()))


def _out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. The kind counts too: a file may be called "out of memory.png"."""
    if isinstance(error, PlphpError) or not isinstance(error, (MemoryError, RuntimeError)):
        return False
    said = str(error).lower()
    return (
        isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said
    )


class _Closed(io.TextIOBase):
    """Stands for a standard output that the parent process has closed."""

    def write(self, text: str) -> int:
        raise InputError("the standard output is closed: redirect it, for example to a file")


class _Output:
    """The standard output, whose errors say that they are its own: a full disk names no file.

    After an error what is left to be written is dropped.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _naming_output():
            return self._stream.write(text)

    def flush(self) -> None:
        with _naming_output():
            self._stream.flush()


@contextlib.contextmanager
def _naming_output() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        drop_output()
        raise InputError(
            f"the standard output cannot be written: {error.strerror or error}: redirect it to "
            "another place"
        ) from error


def open_streams() -> None:
    """Make the standard streams safe to write to.

    The number of a closed stream is occupied with /dev/null. Otherwise the next file that is opened
    would get that number, and output would go into it. A character that the stream's encoding
    lacks is written as an escape.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stdout is None:
        sys.stdout = _Closed()
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = _Output(sys.stdout)  # type: ignore[assignment]
    if sys.stderr is None:  # print(file=None) would write to stdout
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The same command, which ends without an error if a reader such as `head` closes the pipe."""

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
    """Discard what is not written yet. Otherwise Python reports an error at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
