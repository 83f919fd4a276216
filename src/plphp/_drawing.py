"""What draws reports. `plphp/__init__.py` sets it, `plphp.report` asks for it.

A file of its own, so that setting it imports nothing: `import plphp` brings neither torch nor the
reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_found: list[Callable[[], Any]] = []


def draw_with(drawing: Callable[[], Any]) -> None:
    """Set what draws reports, a `plphp.report.Drawing`. It is called when a report is first drawn,
    so it may import late.

    The code that draws needs the models and measurements above `plphp.report`, so that package does
    not import it: `plphp/__init__.py`, which stands above all packages, connects the two.
    """
    _found[:] = [drawing]


def drawing() -> Any:
    """What draws reports."""
    return _found[0]()
