"""Holds the functions that draw reports. `plphp/__init__.py` sets them, `plphp.report` calls them.

This file imports nothing, so that `import plphp` imports neither torch nor the reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_found: list[Callable[[], Any]] = []


def draw_with(drawing: Callable[[], Any]) -> None:
    """Set the functions that draw reports.

    drawing: returns a `plphp.report.Drawing`. It is called when the first report is drawn, and may
        import modules then

    The code that draws imports packages above `plphp.report`, so that `plphp.report` cannot import
    it. `plphp/__init__.py` is above all packages and connects the two.
    """
    _found[:] = [drawing]


def drawing() -> Any:
    """The functions that draw reports, a `plphp.report.Drawing`."""
    return _found[0]()
