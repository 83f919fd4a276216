"""dev/gpu: a crash loses no other result, and results become the page and the constants."""

import copy
import importlib
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from makers import DOCS, maker_of

pytest.importorskip("triton", reason="Triton is not to be had for this platform")
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "dev" / "gpu"))
pieces, run, take = (importlib.import_module(name) for name in ("pieces", "run", "take"))
sys.path.pop(0)
WORKS = "import json; print(json.dumps({'note': 'well'}))"


def a_piece(name: str, code: str, folder: Path, limit: int = 30) -> Any:
    script = folder / f"{name}.py"
    script.write_text(code)
    return pieces.Piece("bench", name, limit, (str(script),), (str(script),))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_crash_a_hang_and_nonsense_the_rest_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [
        a_piece("crash", "import os, sys; print('why', file=sys.stderr); os.abort()", tmp_path),
        a_piece("hang", "import time; time.sleep(60)", tmp_path, limit=1),
        a_piece("nonsense", "print('no JSON')", tmp_path),
        a_piece("last", WORKS, tmp_path),
    ]
    monkeypatch.setattr(run, "pieces", lambda part, dry: made)
    out = tmp_path / "out"
    out.mkdir()
    assert not run.run_part("bench", out, 100, dry=False)
    lines = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    assert [line["state"] for line in lines] == ["failed", "time out", "failed", "ok"]
    assert "why" in lines[0]["said"] and "no JSON" in lines[2]["said"]
    assert lines[3]["result"] == {"note": "well"}
    assert len([*out.iterdir()]) * len(pieces.PARTS) - 2 <= 8, "a lent machine returns 8 files"
    assert capsys.readouterr().out == (out / "summary.txt").read_text()


def test_no_piece_starts_when_the_time_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "pieces", lambda part, dry: [a_piece("late", WORKS, tmp_path)])
    assert run.run_part("bench", tmp_path, run.LEAST - 1, dry=False)
    (line,) = (tmp_path / "bench.jsonl").read_text().splitlines()
    assert json.loads(line)["state"] == "no time"


def test_a_dry_run_takes_every_option() -> None:
    """No flag of a real run is left out, and what matters most comes first."""
    for part in pieces.PARTS:
        for piece in pieces.pieces(part, dry=True):
            flags = {word for word in piece.argv if word.startswith("--")}
            assert flags - {"--gpu", "--dist"} <= {*piece.dry}, piece.name
    names = [piece.name for piece in pieces._bench()]
    assert names[:7] == [
        "32k-x8", "a-tenth", "the-papers-rates", "tune", "32k-x8-compiled", "32k-x1",
        "recall-32k-x8",
    ]  # fmt: skip
    assert pieces.PART_SECONDS <= 480


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as `run.py` leaves it, in which a test and a benchmark failed."""
    folder = tmp_path / "results"
    folder.mkdir()
    found = json.loads((DOCS / "benchmarks" / "cpu" / "ways.json").read_text())
    about = {**found["about"], "machine": "NVIDIA Sample", "date": "2027-01-02"}
    run_ = copy.deepcopy({**found, "about": about})
    run_["setting"]["device"] = "cuda"
    slow = {"name": "stock", "ms": 40.0, "over_stock": [1, 1, 1]}
    fast = {"name": "host at 0.2", "ms": 30.5, "over_stock": [0.76, 0.7, 0.8]}
    recall = {
        "about": about,
        "setting": {"shape": "qwen2-vl-7b", "context": 32768, "batch": 8},
        "steps": [slow, {**fast, "fetched_bytes": 2**21}],
    }
    times = {
        "plain": {256: 3.0, 4096: 2.5, 8192: 1.5, 16384: 1.0},
        "masked": {256: 1.0, 4096: 0.5},
    }
    kernels = [
        {"kind": kind, "slots": slots, "sdpa": 2.0, "triton": spent}
        for kind, each in times.items()
        for slots, spent in each.items()
    ]
    seconds = {"1": 9.0, "8": 3.0, "32": 1.0, "64": 2.0}
    splits = [{"programs": 4, "blocks": 512, "slots": 32768, "seconds": seconds}]
    tune = {"about": about, "multiprocessors": 132, "kernels": kernels, "splits": splits}
    tests = {"passed": 7, "failed": 1, "skipped": 0, "failures": [{"test": "tests/x.py::y"}]}
    said = {
        "check": {"machine": {"devices": ["NVIDIA Sample"]}, "device": tests},
        "bench": {"32k-x8": run_, "recall-32k-x8": recall, "tune": tune, "a-tenth": None},
    }
    for part, lines in said.items():
        text = "".join(
            json.dumps(
                {"piece": name, "state": "failed" if name in ("device", "a-tenth") else "ok",
                 "dry": False, "result": result}
            ) + "\n"
            for name, result in lines.items()
        )  # fmt: skip
        (folder / f"{part}.jsonl").write_text(text)
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with what the import writes and the page is made of."""
    root = tmp_path / "root"
    shutil.copytree(DOCS / "benchmarks", root / "docs" / "benchmarks")
    for name in ("gpu", "gpu-others"):
        shutil.rmtree(root / "docs" / "benchmarks" / name, ignore_errors=True)
    (root / "src" / "plphp" / "attention").mkdir(parents=True)
    return root


def test_a_sample_result_becomes_the_page(
    results: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {path.relative_to(root).as_posix() for path in take.take(results, root)}
    assert written == {
        "docs/benchmarks/gpu/32k-x8.json",
        *(f"docs/benchmarks/gpu-others/{name}.json" for name in ("recall-32k-x8", "tune", "check")),
        "src/plphp/attention/tuned.py",
    }
    maker = maker_of("make_benchmarks")
    monkeypatch.setattr(maker, "FOLDER", root / "docs" / "benchmarks")
    page = maker.page()
    ways = json.loads((DOCS / "benchmarks" / "cpu" / "ways.json").read_text())
    ratio, share = maker.over(ways, "pruned", "stock"), maker.of_bound(ways, "pruned-static")
    for words in (
        "NVIDIA Sample, Python 3.11",
        f"| `plphp bench {maker.GPU['32k-x8']}` | {ratio} |",
        f"| {share} |  |",
        "| host at 0.2 | 30.50 | 0.76 (0.70 - 0.80) | 2.0 |",
        "| device, failed | 7 | 1 | 0 |",
        "- failed: `tests/x.py::y`",
    ):
        assert words in page
    waiting = page.partition("runs that have not been measured")[2]
    assert maker.GPU["a-tenth"] in waiting and f"{maker.GPU['32k-x8']}\n" not in waiting


def test_the_constants_are_chosen_from_the_measurements(results: Path, root: Path) -> None:
    take.take(results, root)
    text = (root / "src" / "plphp" / "attention" / "tuned.py").read_text()
    module = types.ModuleType("tuned")
    exec(compile(text, "tuned.py", "exec"), vars(module))
    assert module.KERNEL_FROM == {"plain": 8192, "masked": 0}
    assert "NVIDIA Sample" in (module.__doc__ or "")
    assert take.split_count(4, 512, 132, take.Costs(*module.COSTS)) < 48, "32 was the fastest"


def test_a_kernel_that_is_never_faster_is_never_used() -> None:
    rows = [{"kind": "plain", "slots": n, "sdpa": 1.0, "triton": 1.1} for n in (256, 512)]
    assert take.kernel_from(rows, "plain") is None


def test_the_constants_here_are_what_an_import_writes() -> None:
    """The file in the package and the text of the import differ in nothing but their values."""
    here = (ROOT / "src" / "plphp" / "attention" / "tuned.py").read_text()
    for part in ("class Costs", "# The number of slots"):
        begin = take.TUNED.index(part)
        text = take.TUNED[begin : take.TUNED.index(" = {", begin)].rpartition("\n")[0]
        assert text.strip() in here


def test_results_of_a_dry_run_are_refused(results: Path, root: Path) -> None:
    path = results / "bench.jsonl"
    path.write_text(path.read_text().replace('"dry": false', '"dry": true'))
    with pytest.raises(SystemExit, match="of a dry run"):
        take.take(results, root)
    with pytest.raises(SystemExit, match="has no results"):
        take.take(root, root)
