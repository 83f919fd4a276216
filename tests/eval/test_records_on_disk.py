"""The directory of a run: what is not of the same run is refused, and nothing of it is lost."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from plphp.errors import InputError
from plphp.eval.sample import Sample, Task
from plphp.eval.store import Store, read_lines
from plphp.eval.tasks import folder

SETTINGS: Mapping[str, Any] = {"model": "embedded"}
LINE = {"task": "t", "method": "plphp", "budget": 0.4}
ODD = "x\u2028y\u2029\u0085\ud800\r\x1c"


def task(question: str = "q") -> tuple[Task, list[Sample]]:
    sample = Sample("a", (Image.new("RGB", (4, 4), "red"),), question)
    return Task("t", "what", lambda count, seed: [sample]), [sample]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    made.open(SETTINGS)
    yield made
    made.close()


def test_odd_texts_stay_on_their_line(store: Store) -> None:
    store.append("t", [{**LINE, "id": ODD, "answer": ODD}, {**LINE, "id": "b"}])
    store.close()
    text = (store.out / "samples" / "t.jsonl").read_text(encoding="utf-8")
    assert len(text.splitlines()) == 2
    assert [line["id"] for line in read_lines(store.out, "t")] == [ODD, "b"]
    assert len(store.finished("t")) == 2
    made, samples = task()
    store.describe(made, [replace(samples[0], id=ODD)])
    store.describe(made, [replace(samples[0], id=ODD)])


def test_another_prompt_or_picture_is_another_run(store: Store) -> None:
    store.describe(*task())
    store.describe(*task())
    made, samples = task()
    blue = replace(samples[0], images=(Image.new("RGB", (4, 4), "blue"),))
    for others in (task("another"), (made, [blue]), (made, [])):
        with pytest.raises(InputError, match="another prompt or other images"):
            store.describe(*others)


def test_a_folder_whose_files_changed_is_another_run(store: Store, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (4, 4), "red").save(pictures / "a.png")
    Image.new("RGB", (4, 4), "red").save(pictures / "scan.pdf")
    made = folder(pictures, "q")
    assert [sample.id for sample in made.draw(5, 1)] == ["a.png"]
    store.describe(made, made.draw(5, 1))
    Image.new("RGB", (4, 4), "green").save(pictures / "a.png")
    with pytest.raises(InputError, match="another prompt or other images"):
        store.describe(folder(pictures, "q"), folder(pictures, "q").draw(5, 1))


def test_two_processes_do_not_share_a_shard(store: Store) -> None:
    store.append("t", [{**LINE, "id": "a"}])
    path = store.out / "samples" / "t.jsonl"
    with path.open("ab") as file:
        file.write(b'{"half')  # another process is in the middle of a line
    before = path.read_bytes()
    other = Store(store.out)
    with pytest.raises(InputError, match="another process is writing this file"):
        other.finished("t")
    assert path.read_bytes() == before
    shard = Store(store.out, (0, 2))
    shard.finished("t")
    store.close()
    other.finished("t")
    shard.close()
    other.close()
    assert path.read_bytes() == before.removesuffix(b'{"half')


@pytest.mark.parametrize("name", ["summary.json", "summary.md", "policies.json", "curves.png"])
def test_files_that_no_run_wrote_are_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="it is not a run"):
        Store(tmp_path).open(SETTINGS)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("content", ["", "mine", "[1]", "[" * 100_000])
def test_a_run_json_of_something_else(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json is not a file of a run"):
        Store(tmp_path).open(SETTINGS)
    assert (tmp_path / "run.json").read_text() == content


@pytest.mark.parametrize("row", ["mine", "[1]", "{}", json.dumps({"method": "x"}), "[" * 100_000])
def test_a_line_that_no_run_wrote_is_named(row: str, store: Store) -> None:
    (store.out / "samples" / "t.jsonl").write_text(f"{json.dumps(LINE)}\n{row}\n")
    with pytest.raises(InputError, match=r"t\.jsonl, line 2 is not a line of a run"):
        list(read_lines(store.out, "t"))
