"""`plphp inspect`: the page and its data, from the command line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import plphp.demo

DEMO = Path(plphp.demo.__file__).parent


@pytest.fixture(autouse=True)
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_without_arguments_it_shows_the_demos_first_example(run: Callable, tmp_path: Path) -> None:
    result = run("inspect", "--rounds", 1)
    assert result.code == 0, result.err
    assert len(result.out.splitlines()) == 2, "a sentence is one line, however narrow the pipe is"
    assert "of the vision K/V kept" in result.out and "open report.html" in result.out
    first = json.loads((DEMO / "questions.json").read_text())[0]
    assert f"plphp's own {first['images'][0]}" in result.err and first["question"] in result.err
    page = (tmp_path / "report.html").read_text()
    assert f"<h1>{first['question']}</h1>" in page and first["images"][0] in page


def test_a_question_about_no_picture_is_refused(run: Callable, tmp_path: Path) -> None:
    result = run("inspect", "--prompt", "what is brown?")
    assert (result.code, result.out, list(tmp_path.iterdir())) == (2, "", [])
    assert result.err == (
        "plphp: --prompt needs --image or --video: --prompt is the question about the images\n"
    )


def test_json_is_the_data_of_the_page(run: Callable, picture: str, tmp_path: Path) -> None:
    question = ["--image", picture, "--prompt", "what is brown in picture 1?", "--rounds", 1]
    result = run("inspect", *question, "--json", "--oracle", "--policies", "plphp, random")
    assert result.code == 0 and list(tmp_path.iterdir()) == []
    data = result.json
    assert [one["policy"] for one in data["runs"]] == ["plphp", "random"]
    assert data["runs"][0]["settings"]["r"] == 0.4
    steps = data["runs"][0]["steps"]
    answer = data["runs"][0]["answer"]
    assert len(steps["kept"]) == len(steps["lost"]) == len(steps["kl"]) == len(answer["tokens"])
    asked = run("generate", *question[:-2], "--json").json
    assert answer["text"] == asked["answer"]
    assert data["runs"][0]["retention"] == asked["report"]["retention"]
    both = run("inspect", *question, "--json", "--out", tmp_path / "p.html", "--budget", ".5")
    inside = (tmp_path / "p.html").read_text().partition('id="data">')[2]
    assert json.JSONDecoder().raw_decode(inside)[0]["runs"] == both.json["runs"]
    assert both.json["runs"][0]["steps"]["lost"] == []


def test_recall_is_on_the_page_and_refused_where_nothing_is_ranked(
    run: Callable, picture: str
) -> None:
    question = ["--image", picture, "--prompt", "what is brown in picture 1?", "--rounds", 1]
    data = run("inspect", *question, "--json", "--recall", "host", "--recall-budget", ".3").json
    (one,) = data["runs"]
    assert one["recall"]["home"] == "host" and one["recall"]["budget"] == 0.3
    assert len(one["steps"]["read"]) == len(one["answer"]["tokens"]) - 1
    refused = run("inspect", *question, "--recall", "int4", "--policy", "fastv")
    assert refused.code == 2 and "does not rank" in refused.err
    assert run("inspect", *question, "--recall-budget", ".3").code == 2


def test_kept_codes_are_on_the_page(run: Callable, picture: str, tmp_path: Path) -> None:
    question = ["--image", picture, "--prompt", "what is brown in picture 1?", "--rounds", 1]
    done = run("inspect", *question, "--kv-bits", 4)
    assert done.code == 0, done.err
    assert "of the vision K/V kept in codes, " in done.out
    assert '"codes": {"bits": 4' in (tmp_path / "report.html").read_text()
    assert run("inspect", *question, "--kv-bits", 3).code == 2
