"""`plphp eval`: from a command to files, twice the same."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

WORDS = (
    "eval", "--tasks", "easyvqa,transcribe", "--methods", "plphp,uniform", "--budgets", ".4",
    "--limit", 4, "--batch", 2,
)  # fmt: skip


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_run_leaves_files_and_the_same_numbers_twice(run: Callable, tmp_path: Path) -> None:
    first = run(*WORDS, "--out", tmp_path / "a", "--json")
    assert first.code == 0
    assert "added to --methods, as controls: random" in first.err
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "run.json", "policies.json", "samples", "tasks", "summary.json", "summary.md",
        "curves.png", "kl.png", "curves-easyvqa.png", "curves-transcribe.png",
    }  # fmt: skip
    methods = [row["method"] for row in first.json["tasks"]["easyvqa"]["settings"]]
    assert methods == ["full", "random", "uniform", "plphp"]
    second = run(*WORDS, "--out", tmp_path / "b")
    assert "| plphp | 40% |" in second.out
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # The same command again has nothing left to do.
    again = run(*WORDS, "--out", tmp_path / "a", "--json")
    assert again.json == first.json
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_two_shards_fill_one_directory(run: Callable, tmp_path: Path) -> None:
    words = ("eval", "--tasks", "easyvqa", "--methods", "uniform", "--budgets", ".4")
    some = (*words, "--limit", 4, "--batch", 2, "--out", tmp_path)
    assert "missing of other shards: " in run(*some, "--shard", "0/2").err
    assert not (tmp_path / "summary.json").exists()
    assert run(*some, "--shard", "1/2").code == 0
    assert json.loads((tmp_path / "summary.json").read_text())["tasks"]["easyvqa"]["samples"] == 4


def test_a_folder_of_images_needs_no_labels(run: Callable, tmp_path: Path, picture: str) -> None:
    words = ("eval", "--images", Path(picture).parent, "--prompt", "describe picture 1.")
    options = ("--methods", "uniform", "--budgets", ".4", "--limit", 3, "--max-new-tokens", 12)
    found = run(*words, *options, "--out", tmp_path, "--json").json["tasks"]["folder"]
    assert (found["metric"], found["samples"]) == ("agreement", 3)
    full, *others = found["settings"]
    assert full["score"]["mean"] == 1 > min(row["score"]["mean"] for row in others)
    assert "exact" not in full["metrics"]


def read_text(direct_url: str | None) -> Callable:
    """How a distribution reads its files where pip has noted this in direct_url.json."""
    own = metadata.PathDistribution.read_text
    return lambda self, name: direct_url if name == "direct_url.json" else own(self, name)


def test_what_is_not_installed_is_named(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("plphp.cli.eval.NEEDS", ("jiwer", "no_such_package"))
    (tmp_path / "pyproject.toml").touch()
    direct_url = {"url": tmp_path.as_uri(), "dir_info": {"editable": True}}
    installed = {
        "a wheel": (None, "pip install 'anls-star>=1'"),
        "a folder": (direct_url | {"dir_info": {}}, f"pip install '{tmp_path}[eval]'"),
        "a folder, editable": (direct_url, f"pip install -e '{tmp_path}[eval]'"),
        "a folder that is gone": (direct_url | {"url": "file:///no/where"}, "pip install 'anls"),
    }
    for how, (url, command) in installed.items():
        text = None if url is None else json.dumps(url)
        monkeypatch.setattr(metadata.PathDistribution, "read_text", read_text(text))
        result = run(*WORDS, "--out", tmp_path)
        assert result.code == 2
        assert result.err.startswith(f"plphp: no_such_package not installed: {command}"), how
        assert " 'plphp[eval]" not in result.err, "plphp is on no package index"


def test_images_without_labels_need_no_metrics(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: str
) -> None:
    """In a process of its own, which has not imported them."""
    words = ("eval", "--images", Path(picture).parent, "--prompt", "describe picture 1.")
    options = ("--methods", "uniform", "--budgets", ".4", "--limit", 1, "--max-new-tokens", 2)
    code = (
        "import sys; from plphp.cli.eval import NEEDS\n"
        "sys.modules |= dict.fromkeys(set(NEEDS) - {'matplotlib'})\n"
        "from plphp.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, (*words, *options, "--out", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("plphp.cli.eval.NEEDS_WITHOUT_LABELS", ("no_such_package",))
    assert "no_such_package not installed" in run(*words, *options, "--out", tmp_path).err
