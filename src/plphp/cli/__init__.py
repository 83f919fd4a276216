"""The command line. Every command prints text for people or, with --json, the same as JSON."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["main"]

INTERRUPTED = 130
IMPORTING = "<frozen importlib._bootstrap>"  # the code that runs the import of a module


def main() -> None:
    """Entry point of the `plphp` command."""
    try:
        with _interruptible():
            # The import of torch takes seconds: it is inside `try`, so that Ctrl-C ends it quietly.
            from plphp.cli.app import main as start

            code = start()
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C end an import, too.

    A KeyboardInterrupt in an import can be lost: torch and transformers take some of them for a
    module that is not installed, and the command would go on without it, or fail with another
    error. A handler that the caller has set, or that ignores the signal, stays as it is.
    """
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not own or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, or end the process if a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTING:
            if sys.stderr is not None and sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt
