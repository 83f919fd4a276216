"""The five pages of the path are short, say first what they are for, and show figures that hold."""

import re
from pathlib import Path

import pytest

from plphp.policy import POLICIES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
NAVIGATION = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
PATH = re.findall(r"^  - [^:\n]+: (\S+\.md)$", NAVIGATION, re.MULTILINE)
WORDS = 1200


def test_the_path_comes_first_and_has_five_pages() -> None:
    assert PATH == ["index.md", "your-model.md", "choosing.md", "serving.md", "measuring.md"]
    assert NAVIGATION.index(PATH[-1]) < NAVIGATION.index("Reference:")


def test_every_page_is_in_the_navigation() -> None:
    named = re.findall(r": (\S+\.md)$", NAVIGATION, re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_says_first_what_it_is_for(path: Path) -> None:
    text = re.sub(r"\A---\n.*?\n---\n+", "", path.read_text(), flags=re.DOTALL)
    assert text.split("\n\n")[1].startswith("After this page you ")


# The glossary is a list of words, and the page of the API is made of docstrings.
SHOWN = sorted({path.name for path in DOCS.glob("*.md")} - {"api.md", "glossary.md"})


@pytest.mark.parametrize("page", SHOWN)
def test_a_page_shows_something(page: str) -> None:
    text = (DOCS / page).read_text()
    figure_or_table = r"^!\[.+\]\(.+\)$|^\|[-:| ]+\|$"
    assert re.search(figure_or_table, text, re.MULTILINE), "no figure and no table"


@pytest.mark.parametrize("page", PATH)
def test_lines_of_code_fit_the_page(page: str) -> None:
    """84 characters are the width of a code block in a window of 1280 pixels."""
    fences = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    for line in "".join(fences).splitlines():
        assert len(line) <= 84, line


# Pages with more words, which programs write. They begin with an overview, and fold the rest.
# This list may only shrink.
LONGER = {
    "accuracy.md", "bad-inputs.md", "benchmarks.md", "doctor.md", "regimes.md", "support.md",
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_a_page_is_short_or_folds_what_is_long(path: Path) -> None:
    text = path.read_text()
    long = len(text.split()) >= WORDS
    assert long == (path.name in LONGER), "shorten the page, or take it off the list"
    if long:
        overview = text.partition("<details")[0]
        assert overview != text and len(overview.split()) < 700, "no overview"


def test_the_readme_is_short() -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    assert len(text.split()) < 900


def test_the_number_of_methods_is_right() -> None:
    assert f"[{len(POLICIES)} methods]" in (ROOT / "README.md").read_text()
    assert f"has all {len(POLICIES)}, " in (DOCS / "choosing.md").read_text()
