"""Old public names. They work for one release, with a DeprecationWarning that says the new name.

A package that had a name in version 0.1.0 which is elsewhere now has one line for all of them:

    __getattr__ = old_names(__name__)

To rename something else, add it to OLD. Delete this file, and those lines, after the next release.
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
            f"{package}.{name} is {new} now; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        module, _, attribute = new.rpartition(".")
        return getattr(import_module(module), attribute)

    return find
