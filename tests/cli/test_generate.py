"""`plphp generate` and `doctor`: answers, JSON, comparison, batches that survive interruption."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from plphp.cli import generate

QUESTION = ("--prompt", "describe picture 1.")
PLPHP = [sys.executable, "-c", "from plphp.cli import main; main()"]


def test_the_answer_streams_to_stdout_and_costs_to_stderr(run: Callable, picture: str) -> None:
    result = run("generate", "--image", picture, *QUESTION, "--r", "1", "--delta-r", "0")
    assert result.code == 0
    assert result.out.startswith("picture 1: ")
    assert "100.0% of vision K/V kept" in result.err


def test_json_holds_what_the_text_shows(run: Callable, picture: str) -> None:
    text = run("generate", "--image", picture, *QUESTION, "--report")
    found = run("generate", "--image", picture, *QUESTION, "--json").json
    assert found["answer"] == text.out.strip()
    assert found["policy"]["name"] == "plphp"
    assert found["policy"]["alpha"] == 0.25
    assert len(found["report"]["layers"]) == 8
    assert f"{found['report']['retention']:.1%} of vision K/V kept" in text.err
    assert "vision-attentive" in text.err


def test_compare_shows_both(run: Callable, picture: str) -> None:
    options = ("--image", picture, *QUESTION, "--compare", "--rounds", 1)
    found = run("generate", *options, "--json").json
    assert found["full"]["kv_bytes"] > found["pruned"]["kv_bytes"] > 0
    assert found["full"]["ms_per_token"] > 0
    table = run("generate", *options)
    assert found["full"]["answer"].split()[-1] in table.out


def test_a_seed_makes_sampling_repeatable(run: Callable, picture: str) -> None:
    options = ("--image", picture, *QUESTION, "--temperature", 3.0, "--max-new-tokens", 20)
    answers = [run("generate", *options, "--seed", seed).out for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_the_prompt_may_come_from_standard_input(picture: str) -> None:
    done = subprocess.run(
        [*PLPHP, "generate", "--image", picture], input="describe picture 1.\n",
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("picture 1: ")


def test_a_closed_pipe_is_no_error(picture: str) -> None:
    command = f"{' '.join(map(repr, PLPHP))} inspect --rounds 1 --json | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert done.stdout == "{"
    assert (done.returncode, done.stderr) == (0, "")


def test_doctor_says_what_a_prompt_takes(run: Callable) -> None:
    found = run("doctor", "embedded", "--images", 2, "--tokens-per-image", 100, "--json").json
    assert found["prunable"]
    assert found["prunable_layers"] == list(range(8))
    # 4 KV heads of 32, keys and values, float32 as it is loaded, 8 layers
    assert found["token_bytes"] == 2 * 4 * 32 * 4 * 8
    assert found["full"] == found["token_bytes"] * 264
    assert found["pruned"][1] == found["token_bytes"] * (64 + 2 * 40)


def test_a_comparison_prints_the_report_of_the_pruned_answer(run: Callable, picture: str) -> None:
    options = ("--image", picture, *QUESTION, "--compare", "--rounds", 1)
    shown = run("generate", *options, "--report")
    assert shown.code == 0 and "layer  gamma  class" in shown.err
    assert "layer  gamma  class" not in run("generate", *options).err


def test_without_vision_tokens_no_share_is_shown(run: Callable) -> None:
    options = ("generate", "--prompt", "hello", "--max-new-tokens", 2)
    for how in ((), ("--report",), ("--compare", "--rounds", 1)):
        shown = run(*options, *how)
        assert shown.code == 0 and "the prompt has no vision tokens" in shown.err
        assert "%" not in shown.out + shown.err and "nan" not in shown.err


# --- batches --------------------------------------------------------------------------------------


def lines_of(folder: Path, picture: str, count: int, bad: int) -> Path:
    """A JSONL of `count` prompts, every so many of them bad in one of five ways."""
    faults = [
        "not json",
        json.dumps(["a", "list"]),
        json.dumps({"images": [picture], "prompt": 7}),
        json.dumps({"images": ["nowhere.png"], "prompt": "x"}),
        json.dumps({"images": 3, "prompt": "x"}),
    ]
    rows = [
        json.dumps({"id": f"n{i}", "images": [picture], "prompt": "describe picture 1."})
        for i in range(count)
    ]
    for i in range(bad):
        rows[i * (count // bad) + 1] = faults[i % len(faults)]
    source = folder / "lines.jsonl"
    source.write_text("\n".join(rows) + "\n")
    return source


def check_batch(out: Path, count: int, bad: int) -> None:
    records = [json.loads(row) for row in out.read_text().splitlines()]
    assert [record["line"] for record in records] == list(range(count))
    assert sum("error" in record for record in records) == bad
    assert len({record["answer"] for record in records if "answer" in record}) == 1
    assert not out.with_name(out.name + ".part").exists()


def batch(source: Path, out: Path) -> tuple[object, ...]:
    return ("generate", "--batch", source, "--out", out, "--max-new-tokens", 4)


def test_a_batch_reports_bad_lines_in_place(run: Callable, tmp_path: Path, picture: str) -> None:
    source, out = lines_of(tmp_path, picture, 20, 5), tmp_path / "out.jsonl"
    result = run(*batch(source, out))
    assert result.code == 3
    assert "20 lines" in result.err
    assert "errors: 5" in result.err
    check_batch(out, 20, 5)
    record = json.loads(out.read_text().splitlines()[0])
    assert record["id"] == "n0"
    assert 0 < record["retention"] < 1


def test_a_directory_is_a_batch(run: Callable, tmp_path: Path, picture: str) -> None:
    out = tmp_path / "out.jsonl"
    folder = Path(picture).parent
    run("generate", "--batch", folder, "--out", out, *QUESTION, "--max-new-tokens", 4)
    ids = [json.loads(row)["id"] for row in out.read_text().splitlines()]
    pictures = [path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")]
    assert ids == sorted(pictures)


def test_a_torn_batch_is_resumed(
    run: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, picture: str
) -> None:
    source, out = lines_of(tmp_path, picture, 20, 5), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    answer, calls = generate.answer, []

    def interrupted(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(generate, "answer", interrupted)
    result = run(*batch(source, out))
    assert result.code == 130 and not out.exists()
    assert f"interrupted: 10 of 20 lines are in {part}; the same command goes on" in result.err
    with part.open("a") as file:
        file.write('{"line": 9, "ans')  # as a power cut would leave it
    assert run(*batch(source, out)).code == 3
    check_batch(out, 20, 5)


@pytest.mark.slow
def test_500_lines_interrupted_by_ctrl_c_and_resumed(tmp_path: Path, picture: str) -> None:
    source, out = lines_of(tmp_path, picture, 500, 20), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    command = [*PLPHP, *map(str, batch(source, out))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not part.exists() or part.read_text().count("\n") < 100:
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not out.exists()
    assert 100 <= part.read_text().count("\n") < 500
    assert subprocess.run(command, capture_output=True).returncode == 3
    check_batch(out, 500, 20)
