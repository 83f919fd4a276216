"""The bounds in pyproject.toml are the tested versions, and the pages name the same ones."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from plphp.hf import compat

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDS = {r.name: r.specifier for r in map(Requirement, PROJECT["dependencies"])}
PINS = {
    name: Version(version)
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}


def bounds(name: str) -> tuple[Version, Version]:
    """The oldest version that is allowed, and the first one that is not."""
    by_operator = {s.operator: Version(s.version) for s in NEEDS[name]}
    return by_operator[">="], by_operator["<"]


def after(version: Version) -> Version:
    """The release line after the one of `version`."""
    return Version(f"{version.major}.{version.minor + 1}")


def test_transformers_is_bounded_by_what_compat_says() -> None:
    assert NEEDS["transformers"] == SpecifierSet(compat.BOUNDS)
    assert bounds("transformers") == (compat.OLDEST, after(compat.TESTED))


@pytest.mark.parametrize("name", ["transformers", "torch"])
def test_the_upper_bound_is_the_line_after_the_pinned_one(name: str) -> None:
    low, above = bounds(name)
    assert low < PINS[name] < above == after(PINS[name])


@pytest.mark.parametrize("page", ["README.md", "docs/limits.md"])
def test_pages_name_the_bounds(page: str) -> None:
    torch = f"{bounds('torch')[0]} to {PINS['torch'].major}.{PINS['torch'].minor}"
    said = f"transformers {compat.OLDEST} to {compat.TESTED}, torch {torch}"
    assert said in (ROOT / page).read_text()


def test_the_oldest_version_is_the_one_that_make_tests() -> None:
    found = re.search(r"^OLDEST \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found and Version(found[1]) == compat.OLDEST
