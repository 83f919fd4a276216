"""Any model that transformers loads, not only the embedded one: a random LLaVA from a directory."""

from pathlib import Path

import pytest
import torch

from integration.test_pipeline import llava
from plphp.eval.batches import make_batch
from plphp.eval.methods import parse
from plphp.eval.run import Plan, run
from plphp.eval.summary import summarize
from plphp.eval.tasks import TASKS
from plphp.inputs import Loaded, load


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llava")
    for part in llava():
        part.save_pretrained(folder)
    found = load(str(folder), "auto", "cpu")
    assert isinstance(found, Loaded)
    return found


def test_rows_of_a_batch_are_the_rows_alone(loaded: Loaded) -> None:
    samples = TASKS["easyvqa"].draw(3, 7)
    batch = make_batch(loaded, samples, 8)
    mask = batch.inputs["attention_mask"].bool()
    for row, sample in enumerate(samples):
        alone = loaded.inputs(sample.images, sample.question)
        assert torch.equal(batch.inputs["input_ids"][row][mask[row]], alone["input_ids"][0])
    assert not mask.all() and mask[:, -1].all()
    assert batch.vision == (36,) * 3


def test_a_run_of_another_model(loaded: Loaded, tmp_path: Path) -> None:
    settings, _ = parse("uniform,downsample", ".4")
    tasks = (TASKS["easyvqa"], TASKS["second"])
    run(
        loaded, Plan(tasks, tuple(settings), tmp_path, 4, 7, 2, 8), {}, lambda *told: lambda n: None
    )
    for task in summarize(tmp_path)["tasks"].values():
        by = {row["method"]: row for row in task["settings"]}
        assert "sizes of its own" in by["downsample"]["skipped"]
        assert by["uniform"]["n"] == 4
        assert 0.4 <= by["uniform"]["kept"] < 0.45
        assert 0 < by["uniform"]["agreement"] <= 1
