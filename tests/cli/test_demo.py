"""`plphp demo`: one screen for the embedded model, and the same for a model of the user's."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from integration.test_pipeline import llava
from plphp.cli import demo, demo_prompts, demo_run
from plphp.demo.model import WEIGHTS, load
from plphp.policy import PLPHP
from plphp.recall import Recall

SMALL = ("--batch", 2, "--vision-tokens", 150, "--rounds", 2)
TODAYS = {"questions", "right_full", "right_pruned", "retention", "kv_bytes_full",
          "kv_bytes_pruned", "ms_per_token_full", "ms_per_token_pruned",
          "first_token_pruned_over_full", "beside"}  # fmt: skip
OF_AN_ANSWER = {"answer", "right", "kv_bytes", "first_token_ms", "ms_per_token"}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Three of the questions, one of each regime; answering all takes a while."""
    only(monkeypatch, 1, 10, 15)
    return 3


def only(monkeypatch: pytest.MonkeyPatch, *places: int) -> None:
    """The demo asks the questions at these places of its list."""
    every = demo_prompts.bundled_questions

    def some(loaded: Any) -> list[demo_prompts.Item]:
        return [every(loaded)[k] for k in places]

    monkeypatch.setattr(demo_prompts, "bundled_questions", some)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The class and the name of every from_pretrained of the classes that load a model here."""
    names: list[tuple[str, str]] = []

    def counted(kind: Any) -> Callable[..., Any]:
        whole = kind.from_pretrained

        def from_pretrained(name: Any, **options: Any) -> Any:
            names.append((kind.__name__, str(name)))
            return whole(name, **options)

        return from_pretrained

    for kind in (Qwen2VLForConditionalGeneration, AutoModelForImageTextToText):
        monkeypatch.setattr(kind, "from_pretrained", counted(kind))
    return names


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "llava"
    for part in llava():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of the embedded model as a model of the user's."""
    folder: Path = tmp_path_factory.mktemp("models") / "qwen2-vl"
    embedded = load(torch.float32)  # many CPUs are slow in bfloat16
    for part in (embedded.model, embedded.tokenizer, embedded.image_processor):
        part.save_pretrained(folder)
    return folder


def test_json_has_the_screen_and_what_it_had_before(
    run: Callable, few: int, loads: list[tuple[str, str]]
) -> None:
    found = run("demo", *SMALL, "--json").json
    assert loads == [("Qwen2VLForConditionalGeneration", str(WEIGHTS))], "the model is loaded once"
    full, published, recommended, host, int4 = found["ways"]
    assert [way["name"] for way in found["ways"]] == [way.name for way in demo_run.ways(PLPHP())]
    assert full["vision_kv_on_device"] == full["ms_per_token_over_full"] == 1
    assert full["first_token_over_full"] == 1
    assert published["kv_bytes"] < full["kv_bytes"] > recommended["kv_bytes"] > host["kv_bytes"]
    assert recommended["vision_kv_on_device"] < 0.42 and int4["vision_kv_on_device"] <= 0.4
    assert host["vision_kv_on_device"] <= 0.2 and host["parked_bytes"] > 0
    assert found["long_prompts"]["rows"] == 2 and found["long_prompts"]["vision_tokens"] >= 150
    summary, questions = found["summary"], found["questions"]
    assert summary.keys() >= TODAYS and summary["questions"] == len(questions) == few
    assert (summary["right_full"], summary["right_pruned"]) == (full["right"], published["right"])
    assert [one["right"] for one in summary["beside"]] == [
        way["right"] for way in (recommended, int4, host)
    ]
    for question in questions:
        assert question["full"].keys() == question["pruned"].keys() == OF_AN_ANSWER
        for answer in question["ways"].values():
            assert answer["right"] == (answer["answer"] == question["expected"])
    assert {question["regime"] for question in questions} == {
        "dense", "redundant-4", "redundant-16"
    }  # fmt: skip
    assert sum(question["full"]["right"] for question in questions) == full["right"]
    assert found["left_out"] == {} and found["advice"].count(".") >= 2


def test_the_screen_and_its_details(run: Callable, few: int) -> None:
    shown = run("demo", *SMALL, "--details", "--r", ".5", "--kv-bits", 2)
    assert shown.code == 0, shown.err
    assert "recommended 40%, 2 bits" in shown.out
    head, _, rest = shown.out.partition("Answers: underlined words differ")
    assert f"of {few}" in head and "PLPHP(r=0.5)" in head and "as published" not in head
    assert "2 rows with" in head and "On a CPU" in head
    assert re.search(r"2 bits .* \d+%\* ", head), "the least on the device has a star"
    assert head.count("For ") + head.count("the fastest") + head.count("The fastest") >= 1
    for title in ("Right answers by regime", "Layers under PLPHP(r=0.5)", "Each question alone"):
        assert title in rest
    assert shown.out.strip().endswith("plphp inspect, then open report.html.")


@pytest.mark.parametrize("family", ["llava", "qwen2-vl"])
def test_another_model_is_judged_by_its_full_cache(
    family: str,
    run: Callable,
    request: pytest.FixtureRequest,
    loads: list[tuple[str, str]],
    picture: str,
) -> None:
    folder = request.getfixturevalue(f"{family.replace('2-vl', '')}_folder")
    options = ("--model", folder, *SMALL, "--max-new-tokens", 6)
    own = ("--image", picture, "--prompt", "describe picture 1.", "--prompt", "read picture 1.")
    found = run("demo", *options, *own, "--json").json
    assert loads.count(("AutoModelForImageTextToText", str(folder))) == 1, (
        "the model is loaded once"
    )
    full, published, *_ = found["ways"]
    assert full["same_as_full"] == full["questions"] == len(found["questions"]) == 2
    assert "right" not in full and published["kv_bytes"] < full["kv_bytes"]
    for question in found["questions"]:
        assert question["expected"] is None and question["images"] == ["a1.png"]
        same = [way["answer"] == question["full"]["answer"] for way in question["ways"].values()]
        assert same == [way["same_as_full"] for way in question["ways"].values()]
    assert found["long_prompts"]["device"] == "cpu"
    # Pictures of 36 vision tokens are repeated, and every row has all of them.
    assert found["long_prompts"]["vision_tokens"] == 180


def test_bundled_pictures_and_prompts_stand_for_missing_ones(
    run: Callable, llava_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_prompts, "PROMPTS", demo_prompts.PROMPTS[:1])
    options = ("--model", llava_folder, *SMALL, "--max-new-tokens", 4)
    shown = run("demo", *options, "--details")
    assert shown.code == 0, shown.err
    assert "same as" in shown.out and "full of 2" in shown.out
    assert "Nothing is known to be right here" in shown.out
    assert "(4 pictures)" in shown.out and "the same" in shown.out
    assert "Right answers by regime" not in shown.out and "inspect" not in shown.out


def test_a_way_that_a_model_cannot_go_is_left_out(
    run: Callable, llava_folder: Path, picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    *others, int4 = demo_run.ways(PLPHP())
    small = replace(int4, recall=Recall("int4", 0.05))  # less than its codes take
    monkeypatch.setattr(demo_run, "ways", lambda *given: [*others, small])
    options = ("--model", llava_folder, *SMALL, "--max-new-tokens", 4, "--image", picture)
    shown = run("demo", *options, "--prompt", "read picture 1.")
    assert shown.code == 0, shown.err
    assert "recall int4 40% is left out: the budget of recall" in " ".join(shown.out.split())
    assert "recall host 20%" in shown.out


def test_the_device_of_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, device in ((1, "cuda"), (2, "auto")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert demo._device("some/model") == device
        assert demo._device("embedded") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo._device("some/model") == "cpu"


def test_a_batch_that_does_not_fit_is_one_line(
    run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, 3)

    def full(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("plphp.bench.decode.decode_in_turn", full)
    result = run("demo", *SMALL)
    assert result.code == 2 and result.err.count("\n") == 1 and result.out == ""
    assert "smaller --batch or --vision-tokens" in result.err


def test_long_prompts_end_where_the_model_does() -> None:
    embedded = load()
    assert embedded.model.config.text_config.max_position_embeddings >= 400
    small = replace(embedded, model=Shrunk(embedded.model, 400))
    long = demo_prompts.long_batch(small, [], "describe picture 1.", 3, 1500)
    assert 200 < long.vision < 400 - demo_prompts.ROOM
    ids = long.inputs["input_ids"]
    assert ids.shape == (3, long.one["input_ids"].shape[1]) and ids.shape[1] < 400
    assert not torch.equal(long.inputs["pixel_values"], long.one["pixel_values"].repeat(3, 1))


class Shrunk:
    """A model whose config allows fewer columns."""

    def __init__(self, model: Any, columns: int) -> None:
        self.device, self.config = model.device, type(model.config)(**model.config.to_dict())
        self.config.text_config.max_position_embeddings = columns
