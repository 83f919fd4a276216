"""Words of messages that depend on a number."""

from __future__ import annotations


def counted(number: int, what: str) -> str:
    """A number and what it counts, such as "1 layer" and "1,200 layers". what: in the singular"""
    return f"{number:,} {what}" + ("" if number == 1 else "s")
