"""What CONTRIBUTING says of folders and commands is so, and both CI files call what exists."""

import re
from pathlib import Path

import pytest
import yaml

import plphp

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
RULES = re.findall(r"^([a-z][\w -]*):(?!=)", MAKEFILE, re.MULTILINE)
TARGETS = {target for rule in RULES for target in rule.split()}
WORKFLOWS = ROOT / ".github" / "workflows"


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def folders(layout: str, parent: str) -> list[str]:
    """The folders that a layout names below `parent`: one or more a line, indented by two more."""
    lines = iter(layout.splitlines())
    indent = next(len(line) - len(line.lstrip()) for line in lines if line.strip() == parent) + 2
    found: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) < indent:
            break
        for word in line.split():
            if not word.endswith("/"):
                break
            found.append(word.rstrip("/"))
    return found


def test_the_layout_names_every_folder_of_the_package() -> None:
    package = ROOT / "src" / "plphp"
    there = {path.parent.name for path in package.glob("*/__init__.py")}
    named = folders(section("Layout"), "src/plphp/")
    assert sorted(named) == sorted(there)


def test_a_folder_that_is_missing_in_the_layout_is_seen() -> None:
    layout = "    src/plphp/\n      policy/   what\n      demo/ bench/   two\n    tests/   unit\n"
    assert folders(layout, "src/plphp/") == ["policy", "demo", "bench"]


def test_other_paths_of_the_layout_exist() -> None:
    for path in (
        "tests",
        "tests/kernels",
        "tests/oracle.py",
        "tests/tiny",
        "training",
        "dev/LOG.md",
    ):
        assert path.rsplit("/")[-1] in section("Layout") and (ROOT / path).exists(), path


@pytest.mark.parametrize(
    "page", ["CONTRIBUTING.md", "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
def test_every_make_command_of_a_page_exists(page: str | Path) -> None:
    named = re.findall(r"(?:^ +|`|^\$ )make ([a-z][\w-]+)", (ROOT / page).read_text(), re.MULTILINE)
    assert set(named) <= TARGETS, page


def called(text: str) -> set[str]:
    return set(re.findall(r'make -C "\$root" ([a-z][\w-]*)', text))


def test_public_ci_runs_what_ours_runs() -> None:
    ours = called((ROOT / ".ci" / "run").read_text())
    public = (WORKFLOWS / "ci.yml").read_text()
    theirs = set(re.findall(r"^ +- ([a-z][\w-]+)(?: [A-Z]+=\S+)?$", public, re.MULTILINE))
    assert ours and ours <= TARGETS
    assert ours - {"environments"} == theirs  # a public job makes its own
    release = (WORKFLOWS / "release.yml").read_text()
    assert set(re.findall(r"run: make ([\w-]+)", release)) == {"release-check"}


def test_the_changelog_has_the_version() -> None:
    assert f"\n## {plphp.__version__}, " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("form", ["fault", "model", "result"])
def test_an_issue_is_asked_for_the_versions(form: str) -> None:
    text = (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text()
    body = yaml.safe_load(text)["body"]
    asked = {part["id"]: part for part in body}
    assert "`plphp env`" in asked["env"]["attributes"]["label"]
    assert asked["env"]["validations"] == {"required": True}
    assert all({"type", "id", "attributes"} <= part.keys() for part in body)


def test_the_citation_names_the_paper_of_the_readme() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = cited["references"][0]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in readme and paper["url"].rpartition("/")[2] in readme
    for author in paper["authors"]:
        assert f"{author['family-names']}, {author['given-names']}" in readme
    assert {"cff-version", "message", "title", "license"} <= cited.keys()


def test_nobody_is_told_to_install_by_a_name_that_is_on_no_index() -> None:
    """Until the first release: `pip install plphp` would fetch nothing, or a stranger's package."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for path in [*pages, *(ROOT / "src").rglob("*.py")]:
        assert not re.search(r"pip install [^\n`]*\bplphp\b(?!/)", path.read_text()), path


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_index_of_the_log_leads_to_its_headings() -> None:
    log = (ROOT / "dev" / "LOG.md").read_text()
    index = log.partition("## By topic\n")[2].partition("\n## ")[0]
    links = re.findall(r"\]\(#([^)]+)\)", index)
    assert links and set(links) <= {slug(h) for h in re.findall(r"^#+ (.+)$", log, re.MULTILINE)}


def test_the_glossary_is_where_people_look() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "mkdocs.yml"):
        assert "glossary.md" in (ROOT / page).read_text(), page
