"""Show the `name: what it is` lines of our docstrings as lists in the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?P<names>[a-z_]\w*(?:, [a-z_]\w*)*)(?P<shape> \([^)]*\))?: (?P<text>.*)")


class Fields(griffe.Extension):
    """Rewrites docstrings once they are loaded; the source keeps its plain lines."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_lists(obj.docstring.value)


def as_lists(text: str) -> str:
    """Every paragraph of fields becomes a list; lines that go on are joined to their field."""
    out: list[str] = []
    inside = False
    for line in text.splitlines():
        match = FIELD.fullmatch(line)
        if match:
            if not inside:
                out.append("")
            names = ", ".join(f"`{name}`" for name in match["names"].split(", "))
            out.append(f"- {names}{match['shape'] or ''}: {match['text']}")
            inside = True
        elif inside and line.startswith("    "):
            out[-1] += " " + line.strip()
        else:
            if inside and line.strip():
                out.append("")
            inside = False
            out.append(line)
    return "\n".join(out)
