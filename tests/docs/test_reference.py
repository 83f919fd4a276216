"""The API reference has every public name, and every public name explains itself."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import plphp

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SHOWN = re.findall(r"^::: (plphp[\w.]*)$", PAGE, re.MULTILINE)
PUBLIC = [name for name in plphp.__all__ if name != "__version__"]


def resolve(path: str) -> Any:
    """`plphp.policy` is a function for a reader, and the package that the other names are in."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def own_docstring(thing: Any) -> str:
    """Not inherited, and not the signature that a dataclass writes for itself."""
    text = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    text = text or ""
    return "" if inspect.isclass(thing) and text.startswith(f"{thing.__name__}(") else text


def members(thing: Any) -> dict[str, Any]:
    """Public methods and properties that a class of ours defines itself."""
    if not inspect.isclass(thing):
        return {}
    kinds = (property, staticmethod, classmethod)
    fields = vars(thing).get("__dataclass_fields__", {})
    return {
        name: value
        for name, value in vars(thing).items()
        if not name.startswith("_") and name not in fields
        if inspect.isfunction(value) or isinstance(value, kinds)
    }


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    assert own_docstring(getattr(plphp, name)), name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_in_the_reference(name: str) -> None:
    path = "plphp.policy.policy" if name == "policy" else f"plphp.{name}"
    assert path in SHOWN


def test_the_version_is_mentioned() -> None:
    assert "plphp.__version__" in PAGE


@pytest.mark.parametrize("path", SHOWN)
def test_what_the_reference_shows_exists_and_explains_itself(path: str) -> None:
    thing = resolve(path)
    assert own_docstring(thing), path
    if path.startswith(("plphp.policy", "plphp.bench", "plphp.PLPHP", "plphp.Report")):
        for name, member in members(thing).items():
            assert member.__doc__, f"{path}.{name}"


@pytest.mark.parametrize("name", ["PLPHP", "policy", "prune", "vision_spans", "PrunedCache"])
def test_what_can_be_refused_says_with_what(name: str) -> None:
    assert "Error" in own_docstring(getattr(plphp, name))


def test_a_missing_docstring_is_seen() -> None:
    from dataclasses import make_dataclass

    assert own_docstring(make_dataclass("Nothing", ["a"])) == ""
