"""The scripts in docs/ that write pages, as modules. pyproject.toml puts docs/ on the path."""

import importlib
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def maker_of(name: str) -> Any:
    return importlib.import_module(name)
