"""`plphp eval --ray`: the lines of a run on one model, whatever happens to a worker."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import once

from plphp.cli import options
from plphp.cli.shared_eval import run_shared, shards_of
from plphp.cluster import Pool
from plphp.eval.methods import parse
from plphp.eval.run import Plan
from plphp.eval.sample import Sample
from plphp.eval.store import read_lines
from plphp.eval.tasks import TASKS

pytestmark = [
    pytest.mark.filterwarnings("default"),  # Ray's own
    pytest.mark.usefixtures("two_cores"),
]
SMALL = ("--tasks", "what,second", "--methods", "plphp", "--budgets", ".4", "--limit", 6)
SMALL = (*SMALL, "--batch", 2, "--max-new-tokens", 4)


def lines(out: Path, task: str) -> list[str]:
    return sorted(json.dumps(line, sort_keys=True) for line in read_lines(out, task))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As a worker has: sums of another number of threads differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_the_lines_of_a_run_on_one_model(run: Callable[..., int], tmp_path: Path) -> None:
    assert run("eval", "--out", tmp_path / "a", *SMALL) == 0
    assert run("eval", "--out", tmp_path / "b", *SMALL, "--ray", "--workers", 2) == 0
    for task in ("what", "second"):
        assert lines(tmp_path / "b", task) == lines(tmp_path / "a", task)
        written = [p.read_bytes() for p in (tmp_path / "b/samples").glob(f"{task}.*jsonl")]
        assert len(written) == 3 and all(written), "three batches, three shards"
        assert b"".join(written).count(b"\n") == len(lines(tmp_path / "b", task)), "none is double"
    for name in ("summary.json", "run.json"):
        assert (tmp_path / "b" / name).read_text() == (tmp_path / "a" / name).read_text()
    # Another number of workers goes on, and so does a run without Ray: nothing is done again.
    before = {p: p.stat().st_size for p in (tmp_path / "b/samples").iterdir()}
    assert run("eval", "--out", tmp_path / "b", *SMALL) == 0
    assert {p: p.stat().st_size for p in before} == before
    # Other settings are refused, as without Ray.
    assert run("eval", "--out", tmp_path / "b", *SMALL, "--seed", 9, "--ray") == 2


def test_a_shard_that_cannot_be_run_is_reported_and_the_others_are(tmp_path: Path) -> None:
    """The first worker that draws the samples is killed, and the next one has no memory left."""

    def draw(count: int, seed: int) -> list[Sample]:
        if once(tmp_path / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if once(tmp_path / "failed"):
            raise MemoryError
        return TASKS["what"].draw(count, seed)

    settings = tuple(parse("plphp", ".4")[0][:1])
    plan = Plan((replace(TASKS["what"], draw=draw),), settings, tmp_path / "run", 8, 7, 2, 4)

    def run_it() -> list[str]:
        about = {"model": "embedded"}
        return run_shared(
            Pool(workers=2), options.Source(), plan, None, lambda *_: about, quiet=True
        )

    (problem,) = run_it()
    assert "no memory left" in problem and "/4" in problem
    assert len(lines(tmp_path / "run", "what")) == 6
    assert run_it() == []
    assert len(lines(tmp_path / "run", "what")) == 8


def test_shards_are_enough_for_the_workers_and_no_more_than_batches() -> None:
    plan = Plan((), (), Path(), 300, 7, 16, 64)
    assert [shards_of(plan, workers) for workers in (1, 2, 8, None)] == [4, 8, 19, 19]
    assert shards_of(replace(plan, limit=100_000), None) == 64
