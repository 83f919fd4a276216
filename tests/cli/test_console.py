"""What is printed, how options are read, and how a command ends whatever its surroundings are."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from plphp.cli import console, demo_details
from plphp.errors import InputError
from plphp.eval.methods import parse

CALL = [sys.executable, "-c", "from plphp.cli import main; main()"]
REFUSED = [
    ("generate --prompt x --out {tmp}/o", "--out needs --batch"),
    ("generate --prompt x --batch {tmp}", "--batch needs --out"),
    ("generate --prompt x --rounds 3", "--rounds needs --compare"),
    ("generate --prompt x --seed 1", "--seed needs --temperature, --top-p or --top-k"),
    ("generate --prompt x --recall-budget .3", "--recall-budget needs --recall"),
    ("generate --prompt x --report --json", "--report cannot be used with --json"),
    ("generate --prompt x --retry", "--retry needs --batch"),
    (
        "generate --prompt x --report --batch {tmp} --out {tmp}/o",
        "--report cannot be used with --batch",
    ),
    (
        "generate --prompt x --image {png} --batch {tmp} --out {tmp}/o",
        "--image cannot be used with --batch",
    ),
    (
        "generate --prompt x --compare --batch {tmp} --out {tmp}/o",
        "--compare cannot be used with --batch",
    ),
    ("generate --prompt x --trust-remote-code", "--trust-remote-code needs --model"),
    ("generate --prompt x --prompt y", "--prompt is given twice"),
    ("generate --prompt x --policy plphp --policy random", "--policy is given twice"),
    ("inspect --policy plphp --policies plphp,random", "--policy cannot be used with --policies"),
    ("inspect --recall-budget .3", "--recall-budget needs --recall"),
    ("inspect --out {tmp}/a --out {tmp}/b", "--out is given twice"),
    ("inspect --out {png}", "is not a page of plphp"),
    ("bench --shape tiny --model embedded", "--shape cannot be used with --model"),
    ("bench --layers 2 --model embedded", "--layers cannot be used with --model"),
    ("bench --images 300 --context 128", "--images 300 do not fit in --context 128"),
    ("bench --keep " + ",".join([".4"] * 7), "7 shares for 6 layers"),
    ("bench --memory nan", "--memory nan"),
    ("bench --memory inf", "--memory inf"),
    ("bench --out {png}", "is a file: give a directory"),
    ("bench --out {tmp}/taken", "is not a result of plphp bench"),
    ("bench --prefill --no-prefill", "--prefill is given twice"),
    (
        "eval --out {tmp}/e --tasks all --images {tmp} --prompt x",
        "--tasks cannot be used with --images",
    ),
    ("eval --out {tmp}/e --prompt x", "--prompt needs --images"),
    ("eval --out {tmp}/e --images {tmp}", "--images needs --prompt"),
    ("eval --out {tmp}/e --trust-remote-code", "--trust-remote-code needs --model"),
    ("generate --prompt x --temperature nan", "--temperature must be above 0"),
    ("generate --prompt x --top-k 99999999999999999999", "--top-k"),
    ("generate --prompt x --seed -1 --top-k 3", "--seed"),
    ("generate --prompt x --device meta", "--device meta"),
    ("generate --prompt x --video {png}", "choose a --model"),
]


@pytest.mark.parametrize(("words", "says"), REFUSED)
def test_options_without_an_effect_are_refused(
    words: str, says: str, run: Callable, tmp_path: Path, picture: str
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "result.json").write_text("[1]")
    before = sorted(tmp_path.rglob("*"))
    result = run(*(word.format(tmp=tmp_path, png=picture) for word in words.split()))
    assert result.code == 2, result.out
    assert says in result.err and result.err.count("\n") == 1
    assert result.err.startswith("plphp: ") and result.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_value_is_no_option(run: Callable) -> None:
    result = run("generate", "--policy", "best", "--prompt", "--debug")
    assert (result.code, result.err.count("\n")) == (2, 1), "no traceback"
    for place in (("--debug", "generate"), ("generate", "--debug")):
        with pytest.raises(ValueError, match="unknown policy"):
            run(*place, "--policy", "best", "--prompt", "x")


def test_what_is_not_ours_is_printed_as_it_stands(
    run: Callable, monkeypatch: pytest.MonkeyPatch, picture: str
) -> None:
    evil = "[bold]no[/bold] [/red] :smile: \x1b[31m\x07\r [link=http://x]y"
    monkeypatch.setattr("plphp.demo.model.Embedded.decode", lambda self, ids: evil)
    options = ("--image", picture, "--prompt", "describe picture 1.", "--max-new-tokens", 2)
    shown = run("generate", *options, "--compare", "--rounds", 1)
    assert shown.code == 0, shown.err
    flat = "".join(shown.out.replace("│", " ").split())
    assert "[bold]no[/bold]" in flat and ":smile:" in flat and "\\x1b[31m\\x07\\r" in flat
    assert "\x1b" not in shown.out and "\x07" not in shown.out
    marked = demo_details.mark("[/red] \x1b right", "a b right")
    assert marked.plain == "[/red] \\x1b right"


def test_a_streamed_answer_controls_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    streamer = console.streamer(None, lambda: None)
    streamer.on_finalized_text("a\x1b[2Jb\n\u202e", stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\\u202e\n"


@pytest.mark.parametrize("name", ["[red].png", "\x1b[31m.png", "a\nb.png", "out of memory.png"])
def test_names_are_shown_on_one_line(name: str, run: Callable, tmp_path: Path) -> None:
    (tmp_path / name).write_text("not a picture")
    result = run("generate", "--image", tmp_path / name, "--prompt", "x")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "not an image that Pillow can read" in result.err and "\x1b" not in result.err
    missing = run("inspect", "--image", "x", "--prompt", "x", "--out", tmp_path / name / name)
    assert (missing.code, missing.err.count("\n")) == (2, 1) and "\x1b" not in missing.err


def test_memory_is_told_by_the_kind_of_error() -> None:
    text = "CUDA out of memory. Tried to allocate 20 GiB"
    full = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    for error in (torch.OutOfMemoryError(text), RuntimeError(full), MemoryError()):
        assert console.one_line(error).startswith("there is no memory left")
    named = OSError(2, "No such file", "out of memory.json")
    for other in (InputError("out of memory.png"), ValueError(text), named):
        assert "no memory left" not in console.one_line(other)
    assert console.one_line(KeyError("q")) == "KeyError: 'q'"


def test_a_character_that_the_encoding_lacks_is_an_escape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("cp1252", "ascii", "utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=name)
        monkeypatch.setattr(sys, "stdout", stream)
        console.open_streams()
        print("a\u0416\ud800\U0001f600", flush=True)
        assert stream.buffer.getvalue().decode(name).startswith("a")  # type: ignore[attr-defined]


def test_streams_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    console.open_streams()
    console.say("into nothing, and not onto stdout")
    with pytest.raises(InputError, match="standard output is closed"):
        print("an answer")
    sys.stderr.close()


def shell(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    text = line.replace("plphp", " ".join(f"'{word}'" for word in CALL), 1)
    return subprocess.run(
        ["bash", "-c", text], capture_output=True, text=True, check=False, **options
    )


NOWHERE = [
    *product(["env", "--help", "generate --help"], [">&-", ">/dev/full"], ["", "1"]),
    ("doctor embedded", ">/dev/full", ""),  # takes seconds
]


@pytest.mark.parametrize(("words", "where", "unbuffered"), NOWHERE)
def test_an_output_that_takes_nothing(words: str, where: str, unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = shell(f"plphp {words} {where}", env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("plphp: the standard output ")


@pytest.mark.parametrize(
    "importing",
    [
        "time.sleep(60)",
        # torch takes an interrupt in some of its imports for a package that is not installed.
        "\n            try: time.sleep(60)\n            except BaseException: pass",
    ],
    ids=["interrupted", "swallowed"],
)
def test_ctrl_c_during_imports_ends_quietly(importing: str) -> None:
    code = (
        "import sys, time, signal\n"
        # A shell starts background jobs with this signal ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Slow:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch':\n"
        f"            print('here', flush=True); {importing}\n"
        "sys.meta_path.insert(0, Slow())\n"
        "from plphp.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "env"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")


def test_the_signal_of_ctrl_c_is_the_callers_again(run: Callable) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert run("env").code == 0 and signal.getsignal(signal.SIGINT) is before


def test_an_alias_is_a_method() -> None:
    settings, _ = parse("recommended,novelty,recommended+int4,recommended:paper", ".4")
    names = [setting.method for setting in settings]
    assert names[:4] == ["full", "novelty", "novelty+int4", "novelty:paper"]


def test_a_picture_that_stands_on_its_side_is_turned(tmp_path: Path) -> None:
    from PIL import ImageOps

    from plphp.eval.tasks import folder
    from plphp.inputs import open_image, upright

    picture = Image.effect_noise((6, 4), 90).convert("RGB")
    for turn in range(9):
        for kind in ("png", "tiff", "webp"):
            exif = Image.Exif()
            exif[0x0112] = turn
            path = tmp_path / f"{turn}.{kind}"
            picture.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
            with Image.open(path) as stored:
                wanted = ImageOps.exif_transpose(stored).convert("RGB")
                assert upright(stored).convert("RGB").tobytes() == wanted.tobytes()
            assert open_image(path).size == wanted.size
            assert open_image(path).tobytes() == wanted.tobytes(), path
    for sample in folder(tmp_path, "x").draw(30, 1):
        assert sample.images[0].tobytes() == open_image(tmp_path / sample.id).tobytes()
