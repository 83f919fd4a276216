"""The command line. Every command prints a table for people and, with --json, the same as JSON."""

import sys

__all__ = ["main"]


def main() -> None:
    """Entry point of the `plphp` command."""
    try:
        # Imported only here: Ctrl-C while torch is imported, which takes seconds, ends it quietly.
        from plphp.cli.app import main as start

        code = start()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
