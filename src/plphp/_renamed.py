"""Old public names. They work for one release, with a DeprecationWarning that gives the new name.

A package with old names has this line:

    __getattr__ = old_names(__name__)

To rename something else, add it to OLD. Delete this file and these lines after the next release.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

_INSPECTOR = (
    "Answer Layer Page Picture Steps examine notebook page_of page_of_report plot render "
    "shown_videos write_html"
)
_REPORT = (
    "EarlierImage LayerReport RecallReport Report Seen images_left images_of in_rows "
    "layer_report untouched_report"
)

# package -> old name -> new path
OLD: dict[str, dict[str, str]] = {
    "plphp.cache": {name: f"plphp.report.{name}" for name in _REPORT.split()}
    | {"told": "plphp.report.earlier_images_note"},
    "plphp.report": {name: f"plphp.inspector.{name}" for name in _INSPECTOR.split()}
    | {"Run": "plphp.inspector.PolicyResult", "run_of": "plphp.inspector.result_of"},
    "plphp.bench": {"Run": "plphp.bench.Timing"},
}


def old_names(package: str) -> Callable[[str], Any]:
    """The module `__getattr__` of a package: it finds the names of OLD, and warns."""

    def find(name: str) -> Any:
        new = OLD[package].get(name)
        if new is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(
            f"{package}.{name} is now {new}: the next release removes the old name",
            DeprecationWarning,
            stacklevel=2,
        )
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)

    return find
