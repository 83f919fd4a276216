"""The command line. Every command prints text for people or, with --json, the same as JSON."""

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the `plphp` command."""
    try:
        # The import of torch takes seconds: it is inside `try`, so that Ctrl-C ends it quietly.
        from plphp.cli.app import main as start

        code = start()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
