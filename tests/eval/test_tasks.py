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
from plphp.demo.boards import Picture, Thing
from plphp.errors import InputError
from plphp.eval.sample import Sample, Task, frames
from plphp.eval.tasks import SUITES, TASKS, folder, video
from plphp.eval.tasks.boards import difference, needle
from plphp.eval.tasks.regimes import SCALES

SCHEDULE = Path(__file__).parents[2] / "training" / "schedule.json"
FEW = 13


def digest(samples: list[Sample]) -> str:
    found = hashlib.sha256()
    for sample in samples:
        found.update(repr((sample.id, sample.question, sample.answers, sample.earlier)).encode())
        for image in sample.images:
            for frame in frames(image):
                found.update(frame.tobytes())
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
        frames(image)[0].save(tmp_path / f"{number}.png")
    samples = folder(tmp_path, "describe picture 1.").draw(300, 7)
    assert sorted(sample.id for sample in samples) == ["0.png", "1.png"]
    assert samples[0].answers == () and frames(samples[0].images[0])[0].mode == "RGB"
    with pytest.raises(InputError, match="no such directory"):
        folder(tmp_path / "none", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image files"):
        folder(tmp_path / "empty", "x")


@pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")
@pytest.mark.parametrize("name", SCALES)
def test_suites_show_the_tasks_at_their_scale(name: str) -> None:
    scale = SCALES[name]
    for task in SUITES[name].values():
        samples = task.draw(2, 7)
        assert digest(samples) == digest(task.draw(3, 7)[:2]) and task.name.endswith(f"@{name}")
        for sample in samples:
            assert sample.answers[0]
            sizes = [frames(image)[0].size for image in sample.images]
            assert all(edge % 28 == 0 for size in sizes for edge in size)
            sides = {wide // 28 // scale for wide, _ in sizes}
            assert min(sides) >= 3 and max(sides) <= 9


@pytest.mark.skipif(not find_spec("skimage"), reason="needs scikit-image")
@pytest.mark.parametrize("task", SUITES["video"].values(), ids=lambda task: task.name)
def test_a_video_task_shows_clips(task: Task) -> None:
    samples = task.draw(5, 7)
    assert digest(samples[:4]) == digest(task.draw(4, 7)) != digest(task.draw(4, 8))
    for sample in samples:
        assert sample.answers[0] and 1 <= len(sample.images) <= 2
        for clip in map(frames, sample.images):
            assert 4 <= len(clip) <= 6 and len({frame.size for frame in clip}) == 1
            assert len({frame.tobytes() for frame in clip}) == len(clip), "noise of their own"


@pytest.mark.parametrize(
    ("change", "places"), [("stays", {1}), ("comes", {1}), ("once", {1}), ("moves", {5})]
)
def test_the_last_thing_of_a_board_changes(change: str, places: set[int]) -> None:
    things = {(0, 0): Thing(1, 1), (1, 2): Thing(2, 2), (3, 3): Thing(3, 3)}
    frames_with = set()
    for seed in range(8):
        film = video._film(Picture(4, things, "scene"), change, 5, np.random.default_rng(seed))
        assert len(film) == 5
        seen = [
            {cell for cell, thing in board.things.items() if thing.glyph == 3} for board in film
        ]
        assert {len(set().union(*seen))} == places
        assert all(set(things.items()) - {((3, 3), things[3, 3])} <= set(board.things.items())
                   for board in film)  # fmt: skip
        frames_with.add(sum(map(bool, seen)))
    expected = {"stays": {5}, "moves": {5}, "once": {1}}
    assert frames_with == expected.get(change, frames_with) and 0 not in frames_with


def test_a_suite_is_named_as_a_whole_or_by_task() -> None:
    whole = _tasks("redundant-4", None, None)
    assert [task.name for task in whole] == list(SUITES["redundant-4"])
    assert [t.name for t in _tasks("what,what@dense", None, None)] == ["what", "what@dense"]
    with pytest.raises(InputError, match="what@redundant-4"):
        _tasks("what@nowhere", None, None)
