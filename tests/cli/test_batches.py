"""Batches: what stands in the way of one, what an earlier run left, and lines of every kind."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from plphp.cli import generate, needs, options
from plphp.cli.requests import model_identity
from plphp.cli.shared_batch import check_same_model
from plphp.cluster import blocks_of
from plphp.errors import InputError
from plphp.inputs import lines

REPORT = SimpleNamespace(retention=0.5, kv_bytes=1, kv_bytes_full=2, undefined=())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """No model: what is asked is written down, and answered at once."""
    calls: list[tuple[Any, ...]] = []

    def answer(job: Any, images: Any, prompt: str) -> tuple[str, Any]:
        calls.append((images, prompt, job.seed))
        if prompt == "stop":
            raise KeyboardInterrupt
        if prompt == "break":
            raise RuntimeError("shapes do not match")
        return f"an answer to {prompt}", REPORT

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr(options.Source, "load", lambda self: None)
    return calls


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("b", "red"), ("c", "green")):
        Image.new("RGB", (8, 8), color).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def interrupted(run: Callable, tmp_path: Path, pictures: Path, asked: list) -> Path:
    """x.part with the first of two pictures in it."""
    out = tmp_path / "x"
    run("generate", "--batch", pictures, "--prompt", "p", "--out", out, "--seed", 5, "--top-k", 3)
    first = out.read_bytes().split(b"\n")[0] + b"\n"
    out.unlink()
    (tmp_path / "x.part").write_bytes(first + b'{"line": 1, "id"')
    asked.clear()
    return tmp_path / "x.part"


SAME = ("--prompt", "p", "--seed", "5", "--top-k", "3")
OTHERS = {
    "another prompt": ("--prompt", "q", *SAME[2:]),
    "another method": (*SAME, "--policy", "random"),
    "an option of the method": (*SAME, "--r", ".5"),
    "recall": (*SAME, "--recall", "host"),
    "another seed": ("--prompt", "p", "--seed", "6", "--top-k", "3"),
    "sampling": ("--prompt", "p"),
    "length": (*SAME, "--max-new-tokens", "9"),
    "number format": (*SAME, "--dtype", "bfloat16"),
    "attention": (*SAME, "--attn", "eager"),
}


def test_the_same_command_goes_on(
    run: Callable, tmp_path: Path, pictures: Path, interrupted: Path, asked: list
) -> None:
    result = run("generate", "--batch", pictures, "--out", tmp_path / "x", *SAME)
    assert result.code == 0, result.err
    assert [Path(images[0]).name for images, *_ in asked] == ["c.png"]
    assert asked[0][2] == 6, "the second line's seed, as without an interruption"
    assert [r["id"] for r in records(tmp_path / "x")] == ["b.png", "c.png"]


@pytest.mark.parametrize("what", OTHERS)
def test_another_command_does_not(
    what: str, run: Callable, tmp_path: Path, pictures: Path, interrupted: Path, asked: list
) -> None:
    before = interrupted.read_bytes()
    result = run("generate", "--batch", pictures, "--out", tmp_path / "x", *OTHERS[what])
    assert (result.code, asked) == (2, [])
    assert "belongs to another batch" in result.err and "move the file away" in result.err
    assert interrupted.read_bytes() == before and not (tmp_path / "x").exists()


def test_a_file_added_changed_or_gone_is_noticed(
    run: Callable, tmp_path: Path, pictures: Path, interrupted: Path, asked: list
) -> None:
    again = ("generate", "--batch", pictures, "--out", tmp_path / "x", *SAME)
    shutil.copy(pictures / "c.png", pictures / "a.png")
    assert "its line 0 differs" in run(*again).err
    (pictures / "a.png").unlink()
    whole = (pictures / "b.png").read_bytes()
    shutil.copy(pictures / "c.png", pictures / "b.png")  # another picture of the same name
    assert "its line 0 differs" in run(*again).err
    (pictures / "b.png").unlink()
    assert "its line 0 differs" in run(*again).err
    (pictures / "b.png").write_bytes(whole)
    shutil.copy(pictures / "c.png", pictures / "d.png")  # comes after what is done
    assert run(*again).code == 0
    assert [r["id"] for r in records(tmp_path / "x")] == ["b.png", "c.png", "d.png"]


@pytest.mark.parametrize(
    "content",
    [b"my notes", b"my notes\n", b'{"line": 0}\n', b"[1]\n", b"\xff\xfe\n", b'{"a": 1}', b"\n"],
)
def test_a_foreign_file_is_left_alone(
    content: bytes, run: Callable, tmp_path: Path, pictures: Path, asked: list
) -> None:
    part = tmp_path / "x.part"
    part.write_bytes(content)
    result = run("generate", "--batch", pictures, "--out", tmp_path / "x", "--prompt", "p")
    assert result.code == 2 and "move it away" in result.err
    assert part.read_bytes() == content and asked == []


def test_a_directory_in_place_of_the_part_file_is_refused(
    run: Callable, tmp_path: Path, pictures: Path, asked: list
) -> None:
    (tmp_path / "x.part").mkdir()
    result = run("generate", "--batch", pictures, "--out", tmp_path / "x", "--prompt", "p")
    assert result.code == 2 and "it is no file" in result.err


def test_two_processes_do_not_share_an_output(
    run: Callable, tmp_path: Path, pictures: Path, asked: list
) -> None:
    with (tmp_path / "x.part").open("a+b") as held:
        lines.lock(held, "x")
        result = run("generate", "--batch", pictures, "--out", tmp_path / "x", "--prompt", "p")
    assert result.code == 2 and "another process is writing this file" in result.err
    assert asked == []


def test_an_output_that_appears_meanwhile_is_kept(
    run: Callable, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write(tmp_path / "a.jsonl", [{"prompt": "p"}]), tmp_path / "x"

    def answer(*args: object) -> tuple[str, Any]:
        out.write_text("somebody else's")
        return "an answer", REPORT

    monkeypatch.setattr(generate, "answer", answer)
    result = run("generate", "--batch", source, "--out", out)
    assert result.code == 2 and "was made while this batch ran" in result.err
    assert out.read_text() == "somebody else's" and (tmp_path / "x.part").exists()


def test_separators_of_other_readers_end_no_line(
    run: Callable, tmp_path: Path, asked: list
) -> None:
    odd = "x\u2028y\u2029z\u0085\x0b\x0c\x1c\x1d\x1e\r"
    source = write(tmp_path / "a.jsonl", [{"id": odd, "prompt": odd}, {"prompt": "second"}])
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 0
    found = records(tmp_path / "x")  # read with str.splitlines, as many readers do
    assert [record["line"] for record in found] == [0, 1]
    assert found[0]["id"] == odd and found[0]["answer"] == f"an answer to {odd}"
    (tmp_path / "x").rename(tmp_path / "y.part")
    assert run("generate", "--batch", source, "--out", tmp_path / "y").code == 0
    assert len(asked) == 2, "nothing is answered twice"


def test_a_line_never_ends_the_batch(run: Callable, tmp_path: Path, asked: list) -> None:
    rows = {
        b'{"prompt": "a", "video": "v.mp4"}': "unknown key 'video'",
        b'{"prompt": "a", "image": "a.png"}': "unknown key 'image' (did you mean 'images'?)",
        b'{"prompt": "a", "prompt": "b"}': "has the key 'prompt' twice",
        b'{"id": NaN, "prompt": "a"}': "NaN is not a JSON number",
        b'{"id": -Infinity, "prompt": "a"}': "-Infinity is not a JSON number",
        b'{"id": 1e999, "prompt": "a"}': "1e999 is too large",
        b'{"id": ' + b"1" * 5000 + b', "prompt": "a"}': "too many digits",
        b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested deeper",
        b'{"id": ' + b"[" * 80 + b"]" * 80 + b', "prompt": "a"}': "nested deeper",
        b'{"prompt": "\xff"}': "not UTF-8 text",
        b"": "the line is empty",
        b'{"prompt": null}': "there is no prompt: give one in the line, or --prompt",
        b'{"prompt": 5}': "prompt must be a string",
        b'{"prompt": "break"}': "shapes do not match",
    }
    good = b'{"id": "\\ud800", "prompt": "good"}\r\n'
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + good + b"\n".join(rows) + b"\n" + good)
    result = run("generate", "--batch", source, "--out", tmp_path / "x")
    assert result.code == 3, "done, and some lines hold an error"
    first, *bad, last = records(tmp_path / "x")
    assert first["answer"] == last["answer"] == "an answer to good" and first["id"] == "\ud800"
    for record, says in zip(bad, rows.values(), strict=True):
        assert says in record["error"], record
        assert "\n" not in record["error"]


def test_names_and_prompts_that_no_system_takes_are_errors_of_their_line(
    run: Callable, tmp_path: Path
) -> None:
    rows = [
        {"images": "a" * 300 + ".png", "prompt": "p"},
        {"images": "\ud800.png", "prompt": "p"},
        {"images": "a\0b.png", "prompt": "p"},
        {"images": [], "prompt": "\udcff"},
        {"images": [], "prompt": "<|image_pad|>"},
        {"images": "fifo.png", "prompt": "p"},
        {"images": [], "prompt": " "},
        {"images": "https://x.org/a.png", "prompt": "p"},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.mkfifo(tmp_path / "fifo.png")
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 3
    said = ("too long", "not a file name", "not a file name", "not text", "contains <|image_pad|>",
            "not a regular file", "prompt is empty",
            "image https://x.org/a.png: a URL is not read")  # fmt: skip
    for record, word in zip(records(tmp_path / "x"), said, strict=True):
        assert word in record["error"]


def test_a_directory_counts_what_can_be_read(
    run: Callable, tmp_path: Path, pictures: Path, asked: list
) -> None:
    Image.new("RGB", (8, 8)).save(pictures / "scan.pdf")
    for name in ("film.mpg", "data.h5", "weather.grib", "drawing.wmf"):
        (pictures / name).write_bytes(b"x")
    (pictures / "folder.png").mkdir()
    shutil.copy(pictures / "b.png", pictures / "[bold]\x1b[31m\n.png")
    shutil.copy(pictures / "b.png", os.fsencode(pictures) + b"/\xff.png")
    out = tmp_path / "x"
    result = run("generate", "--batch", pictures, "--prompt", "p", "--out", out)
    assert result.code == 0, result.err
    ids = [record["id"] for record in records(out)]
    assert ids == ["[bold]\x1b[31m\n.png", "b.png", "c.png", "\udcff.png"]


def test_a_batch_in_utf_16_is_refused_whole(run: Callable, tmp_path: Path, asked: list) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "p"}\n', encoding="utf-16")
    result = run("generate", "--batch", tmp_path / "a.jsonl", "--out", tmp_path / "x")
    assert result.code == 2 and "save it as UTF-8" in result.err


def test_a_full_disk_names_the_file(
    run: Callable, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    source = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    monkeypatch.setattr("plphp.cli.batch.os.fsync", full)
    result = run("generate", "--batch", source, "--out", tmp_path / "x")
    assert result.code == 2
    assert "x.part: No space left" in result.err and "to continue the batch" in result.err


def test_answers_in_any_order_are_gone_on_with(run: Callable, tmp_path: Path, asked: list) -> None:
    """As several workers leave them: the whole file has the order of the lines."""
    source = write(tmp_path / "a.jsonl", [{"prompt": f"p{k}"} for k in range(6)])
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 0
    whole = (tmp_path / "x").read_bytes()
    rows = whole.splitlines(keepends=True)
    asked.clear()
    (tmp_path / "y.part").write_bytes(rows[4] + rows[0] + rows[3])
    assert run("generate", "--batch", source, "--out", tmp_path / "y").code == 0
    assert [prompt for _, prompt, _ in asked] == ["p1", "p2", "p5"]
    assert (tmp_path / "y").read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "x", "y"}
    for rest in (rows[4] + rows[4], rows[2].replace(b"2", b"-2", 1)):  # no run leaves these
        (tmp_path / "z.part").write_bytes(rest)
        result = run("generate", "--batch", source, "--out", tmp_path / "z")
        assert result.code == 2 and "is not from a batch" in result.err


def test_nothing_is_loaded_for_a_batch_that_is_answered(
    run: Callable, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 0
    (tmp_path / "x").rename(tmp_path / "y.part")
    monkeypatch.setattr(options.Source, "load", None)
    assert run("generate", "--batch", source, "--out", tmp_path / "y").code == 0


def test_a_full_disk_at_the_end_loses_nothing(
    run: Callable, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": f"p{k}"} for k in range(2)])
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 0
    rows = (tmp_path / "x").read_bytes().splitlines(keepends=True)
    (tmp_path / "y.part").write_bytes(rows[1] + rows[0])

    def full(old: Path, new: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("plphp.cli.batch.os.replace", full)
        result = run("generate", "--batch", source, "--out", tmp_path / "y")
    assert result.code == 2 and "y.part.sorted: No space left" in result.err
    assert run("generate", "--batch", source, "--out", tmp_path / "y").code == 0
    assert (tmp_path / "y").read_bytes() == b"".join(rows)


@pytest.mark.parametrize(
    ("words", "all_of_them"),
    [
        (["--ray"], ["--ray", "local"]),
        (["--ray", "--out", "x"], ["--ray", "local", "--out", "x"]),
        (["--ray", "auto", "--out", "x"], ["--ray", "auto", "--out", "x"]),
        (["--ray=a:1"], ["--ray=a:1"]),
        ([], []),
    ],
    ids=["alone", "before another", "address", "equals", "nothing"],
)
def test_ray_may_stand_without_an_address(words: list[str], all_of_them: list[str]) -> None:
    assert needs.with_values(words) == all_of_them


def test_without_ray_one_line_says_what_to_install(
    run: Callable, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run("generate", "--batch", source, "--out", tmp_path / "x", "--ray")
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "--ray needs Ray Data" in result.err and "pip install" in result.err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    for files in ((source, "x.parquet"), (tmp_path / "a.parquet", "x")):
        result = run("generate", "--batch", files[0], "--out", tmp_path / files[1])
        assert result.code == 2 and "Parquet needs pyarrow: pip install" in result.err


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--ray", "ray://head:10001"), "ray job submit"),
        (("--ray", "--device", "cuda:1"), "cannot be used with --ray"),
        (("--ray", "--device", "auto"), "cannot be used with --ray"),
        (("--workers", "2"), "--workers needs --ray"),
    ],
    ids=["client", "one GPU of several", "all GPUs", "workers alone"],
)
def test_what_cannot_be_shared_is_refused_before_ray_is_needed(
    option: tuple[str, ...], says: str, run: Callable, tmp_path: Path, asked: list
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "p"}])
    result = run("generate", "--batch", source, "--out", tmp_path / "x", *option)
    assert result.code == 2 and says in result.err


def test_a_list_is_cut_into_blocks_that_can_be_counted() -> None:
    assert [blocks_of(count) for count in (0, 1, 8, 9, 2000)] == [0, 1, 1, 2, 250]
    assert blocks_of(3, 1) == 3
    assert blocks_of(10_000_000) == 10_000, "a million blocks would be too many to look after"


def test_another_model_on_a_worker_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    key = {"model": model_identity(str(tmp_path)), "source": {"model": str(tmp_path)}}
    os.utime(tmp_path / "config.json", (1, 1))
    check_same_model(key)  # a copy of the same files
    with pytest.raises(InputError, match="install the same versions"):
        check_same_model({**key, "model": ["other", *key["model"][1:]]})
    (tmp_path / "config.json").write_text("{ }")
    with pytest.raises(InputError, match="the same model's files"):
        check_same_model(key)


def test_lines_are_split_at_line_feeds_only() -> None:
    data = "\ufeffa\u2028b\r\nc\u0085\n\nlast".encode()
    assert lines.split_lines(data) == ["a\u2028b".encode(), "c\u0085".encode(), b"", b"last"]
    assert lines.split_lines(b"") == []
    with pytest.raises(InputError, match="nested deeper"):
        lines.load(b"[" * 70 + b"]" * 70)
    assert lines.load(b"[" * 60 + b"]" * 60)


def test_other_weights_of_the_embedded_model_are_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of the older weights, which had the same version, cannot be continued with new ones."""
    before = model_identity("embedded")
    assert before == model_identity("embedded")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setattr("plphp.cli.requests.files", lambda package: tmp_path)
    assert model_identity("embedded") != before


# --- lines with an error --------------------------------------------------------------------------


@pytest.fixture
def failing(run: Callable, tmp_path: Path, pictures: Path, asked: list) -> Path:
    """A finished batch whose lines 1 and 3 have an error."""
    rows = [{"prompt": "a"}, {"prompt": "break"}, {"images": "pictures/b.png", "prompt": "c"}, 4]
    source = write(tmp_path / "in.jsonl", rows)
    result = run("generate", "--batch", source, "--out", tmp_path / "x")
    assert result.code == 3
    assert result.err.splitlines()[-3:] == [
        f"{tmp_path / 'x'} has 4 lines, errors: 2, without images: 2",
        "line 1: torch failed: shapes do not match; plphp --debug COMMAND ... shows where",
        "line 3: the line is not a JSON object with images and prompt",
    ]
    asked.clear()
    return source


def test_lines_with_an_error_are_answered_again(
    run: Callable, tmp_path: Path, failing: Path, asked: list
) -> None:
    out = tmp_path / "x"
    before = records(out)
    again = ("generate", "--batch", failing, "--out", out)
    assert "or --retry" in run(*again).err and records(out) == before
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"images": "pictures/b.png", "prompt": "c"}, 4]
    write(failing, rows)
    result = run(*again, "--retry")
    assert (result.code, [prompt for _, prompt, _ in asked]) == (3, ["b"])
    assert "errors: 1, without images: 2\nline 3: the line is not" in result.err
    write(failing, [*rows[:3], {"prompt": "d"}])
    assert run(*again, "--retry").code == 0
    assert [r["answer"][-1] for r in records(out)] == ["a", "b", "c", "d"]
    assert records(out)[0] == before[0] and not (tmp_path / "x.part").exists()
    fresh = ("generate", "--batch", failing, "--out", tmp_path / "y", "--retry")
    assert run(*fresh).code == 0  # there is nothing to retry yet


def test_a_retry_leaves_what_it_cannot_read(
    run: Callable, tmp_path: Path, failing: Path, asked: list
) -> None:
    out = tmp_path / "x"
    again = ("generate", "--batch", failing, "--out", out, "--retry")
    before = out.read_bytes()
    assert "belongs to another batch" in run(*again, "--max-new-tokens", 9).err
    assert out.read_bytes() == before and not (tmp_path / "x.part").exists()
    (tmp_path / "x.part").touch()
    assert "move one of them away" in run(*again).err
    (tmp_path / "x.part").unlink()
    out.write_text("my notes\n")
    assert "this file is not from a batch" in run(*again).err
    assert out.read_text() == "my notes\n" and asked == []
    assert not (tmp_path / "x.part").exists()


def test_a_url_in_a_line_is_called_so(run: Callable, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"images": "https://x.org/a.png", "prompt": "p"}])
    assert run("generate", "--batch", source, "--out", tmp_path / "x").code == 3
    assert "a URL is not read" in records(tmp_path / "x")[0]["error"]
