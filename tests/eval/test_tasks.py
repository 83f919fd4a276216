"""Samples: the same for the same seed, held out, and about what their task is about."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from zlib import crc32

import easy_vqa
import numpy as np
import pytest

from plphp.cli.eval import _tasks
from plphp.errors import InputError
from plphp.eval.sample import Sample
from plphp.eval.tasks import SUITES, TASKS, folder
from plphp.eval.tasks.boards import difference, needle
from plphp.eval.tasks.regimes import SCALES

SCHEDULE = Path(__file__).parents[2] / "training" / "schedule.json"
FEW = 13


def digest(samples: list[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(repr((sample.id, sample.question, sample.answers, sample.earlier)).encode())
        for image in sample.images:
            found.update(image.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("name", TASKS)
def test_a_seed_fixes_the_samples(name: str) -> None:
    draw = TASKS[name].draw
    samples = draw(FEW, 7)
    assert digest(samples) == digest(draw(FEW, 7)) != digest(draw(FEW, 8))
    assert digest(draw(5, 7)) == digest(samples[:5])
    assert len({sample.id for sample in samples}) == FEW
    assert all(sample.answers for sample in samples)


@pytest.mark.parametrize("name", ["easyvqa", "digits"])
def test_there_are_enough_samples(name: str) -> None:
    assert len(TASKS[name].draw(300, 7001)) == 300


def test_easyvqa_is_the_test_split_in_its_own_files() -> None:
    known = set(zip(*easy_vqa.get_test_questions()[:2], strict=True))
    for sample in TASKS["easyvqa"].draw(FEW, 7):
        assert (sample.question, sample.answers[0].removeprefix("the answer is ")) in known


def test_no_stream_of_training_is_drawn_again() -> None:
    """Training, evaluation and demo seeds are single numbers, a task's is a pair."""
    schedule = json.loads(SCHEDULE.read_text())
    used = [stage["seed"] for stage in schedule["from_nothing"] + schedule["stages"]]
    used += [*range(1, 7), 20240, 31005]  # 1 to 6 trained the first weights
    used += [*range(31101, 31110), *range(31201, 31210)]  # the demo's photographs
    streams = {np.random.default_rng(seed).bytes(8) for seed in used}
    for seed in (*used, 7001):
        for name in TASKS:
            assert np.random.default_rng([seed, crc32(name.encode())]).bytes(8) not in streams


def test_needle_has_1_to_12_pictures_and_one_needle() -> None:
    samples = TASKS["needle"].draw(24, 7)
    assert [len(sample.images) for sample in samples] == [*range(1, 13)] * 2
    for number in range(24):
        pictures, question, answer = needle(np.random.default_rng(number), number)
        colour = question.split()[2]
        found = [t for p in pictures for t in map(str, p.things.values()) if colour in t]
        assert found == [f"{colour} {answer.split()[-1]}"]


def test_difference_differs_in_one_cell() -> None:
    for number in range(FEW):
        (first, second), question, answer = difference(np.random.default_rng(number), number)
        changed = [cell for cell, thing in first.things.items() if second.things[cell] != thing]
        assert len(changed) == 1 and first.things.keys() == second.things.keys()
        thing = (first if "picture 1" in question else second).things[changed[0]]
        assert f"{answer.split()[-1]} {question.split()[4]}" == str(thing)


@pytest.mark.parametrize(("name", "rows"), [("transcribe", 1), ("grid", 2)])
def test_pages_have_the_number_of_rows_of_their_task(name: str, rows: int) -> None:
    for sample in TASKS[name].draw(FEW, 7):
        assert sample.answers[0].count(" / ") == rows - 1


def test_long_answers_are_long() -> None:
    for sample in TASKS["long"].draw(5, 7):
        assert len(sample.answers[0].replace(",", " ,").replace(":", " :").split()) >= 60


def test_second_questions_are_about_another_picture() -> None:
    for sample in TASKS["second"].draw(FEW, 7):
        assert sample.earlier == "describe picture 1."
        assert "picture 1?" not in sample.question and len(sample.images) > 1


def test_a_folder_without_labels(tmp_path: Path) -> None:
    images = TASKS["describe"].draw(3, 7)[0].images
    for number, image in enumerate(images[:2]):
        image.save(tmp_path / f"{number}.png")
    samples = folder(tmp_path, "describe picture 1.").draw(300, 7)
    assert sorted(sample.id for sample in samples) == ["0.png", "1.png"]
    assert samples[0].answers == () and samples[0].images[0].mode == "RGB"
    with pytest.raises(InputError, match="no such directory"):
        folder(tmp_path / "none", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image files"):
        folder(tmp_path / "empty", "x")


@pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")
@pytest.mark.parametrize("name", SUITES)
def test_suites_show_the_tasks_at_their_scale(name: str) -> None:
    scale = SCALES[name]
    for task in SUITES[name].values():
        samples = task.draw(2, 7)
        assert digest(samples) == digest(task.draw(3, 7)[:2]) and task.name.endswith(f"@{name}")
        for sample in samples:
            assert sample.answers[0]
            assert all(edge % 28 == 0 for image in sample.images for edge in image.size)
            sides = {image.width // 28 // scale for image in sample.images}
            assert min(sides) >= 3 and max(sides) <= 9


def test_a_suite_is_named_as_a_whole_or_by_task() -> None:
    whole = _tasks("redundant-4", None, None)
    assert [task.name for task in whole] == list(SUITES["redundant-4"])
    assert [t.name for t in _tasks("what,what@dense", None, None)] == ["what", "what@dense"]
    with pytest.raises(InputError, match="what@redundant-4"):
        _tasks("what@nowhere", None, None)
