"""The command line. Every command prints a table for people and, with --json, the same as JSON."""

from plphp.cli.app import main

__all__ = ["main"]
