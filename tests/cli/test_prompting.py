"""Errors of processors that are not about the pictures: they name the model, or what is missing."""

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import video_utils

from lmms.tiny_llava import save
from plphp import _installed, inputs
from plphp.demo.model import WEIGHTS
from plphp.errors import InputError
from plphp.inputs import Loaded, make_inputs, prompts
from plphp.inputs.processors import videos_note


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "llava"
    folder.mkdir()
    save(folder)
    return folder


@pytest.fixture
def mute(llava: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "mute"
    shutil.copytree(llava, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize(
    "command",
    [["generate"], ["generate", "--compare"], ["inspect"], ["demo"],
     ["generate", "--memory", "4GiB"]],
    ids=" ".join,
)  # fmt: skip
def test_a_model_without_a_chat_template(
    command: list[str], mute: Path, picture: str, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mute.parent)
    result = run(*command, "--model", mute, "--image", picture, "--prompt", "x")
    assert result.code == 2 and "a1.png" not in result.err
    assert f"plphp: {mute} cannot be prompted: it has no chat template: put its " in result.err


def test_a_batch_of_a_model_without_a_chat_template(mute: Path) -> None:
    loaded = inputs.load(str(mute), "auto", "cpu")
    with pytest.raises(InputError, match=r"mute cannot be prompted: .*chat_template\.jinja"):
        loaded.batch([([], "x"), ([], "yes")])


def test_the_files_of_the_embedded_model_without_a_template(tmp_path: Path, run: Callable) -> None:
    folder = tmp_path / "mute"
    shutil.copytree(WEIGHTS, folder)
    (folder / "chat_template.jinja").unlink()
    result = run("generate", "--model", folder, "--prompt", "x")
    assert result.code == 2 and f"{folder} cannot be prompted: it has no chat" in result.err


@pytest.mark.parametrize("template", ["{% if %}", "{{ raise_exception('no role') }}",
                                      "{{ 'a' + messages[0]['content'] }}"])  # fmt: skip
def test_a_template_that_fails(template: str, mute: Path, picture: str, run: Callable) -> None:
    (mute / "chat_template.jinja").write_text(template)
    result = run("generate", "--model", mute, "--image", picture, "--prompt", "x")
    assert result.code == 2 and result.err.startswith(f"plphp: {mute} cannot be prompted: its ch")
    assert result.err.count("\n") == 1 and "a1.png" not in result.err


def refusing(error: Callable[[int], Exception]) -> Loaded:
    """A model whose processor raises `error` of the number of pictures of a chat."""

    def apply(chats: Any, tokenize: bool, **options: Any) -> str:
        if tokenize:
            raise error(sum(part["type"] != "text" for part in chats[0]["content"]))
        return ""

    model = SimpleNamespace(name_or_path="some/model", config=SimpleNamespace())
    return Loaded(model, SimpleNamespace(apply_chat_template=apply, chat_template="x"))


@pytest.fixture(autouse=True)
def no_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "check_prompt", lambda loaded, prompt: None)


@pytest.mark.parametrize(
    ("error", "said"),
    [(lambda n: OSError("no words"), "some/model: its processor refuses a prompt of text alone"),
     (lambda n: OSError("odd") if n else OSError("none"), "image 1: the model's processor refu"),
     (lambda n: ImportError("X requires the scipy library. See"), "missing: X requires the sci")],
    ids=["every prompt", "this picture", "a package"],
)  # fmt: skip
def test_what_an_error_is_about_is_named(error: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        make_inputs(refusing(error), [Image.new("RGB", (9, 9))], "x")


DECODERS = (
    "`torchcodec` is not installed or can't be loaded, so it cannot decode the video by default. "
    + video_utils.TORCHVISION_VIDEO_DECODING_ERROR
)


def unloadable(name: str) -> None:
    raise OSError("libavutil.so.60: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize("here", [False, True])
def test_videos_that_cannot_be_decoded(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torchcodec is here, FFmpeg may be missing."""
    monkeypatch.setattr(_installed, "has_torchcodec", lambda: here)
    monkeypatch.setattr(importlib, "import_module", unloadable)
    with pytest.raises(InputError) as raised:
        make_inputs(refusing(lambda n: ImportError(DECODERS)), [], "x", ["clip.gif"])
    said = str(raised.value)
    assert said.startswith("clip.gif") and "refuses it" not in said
    assert ("pip install 'torchcodec>=0.12'" in said) == (not here) and "FFmpeg" in said
    assert ("which is installed and cannot be loaded (libavutil.so.60: " in said) == here


def test_doctor_remarks_that_videos_cannot_be_decoded(
    run: Callable, tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plphp.inputs import processors

    for module in (processors, _installed):
        monkeypatch.setattr(module, "has_torchcodec", lambda: False)
    shutil.copytree(WEIGHTS, tmp_path, dirs_exist_ok=True)
    note = "videos need torchcodec, which is not installed: pip install 'torchcodec>=0.12'"
    assert f"note: {note}" in run("doctor", tmp_path).out
    for pictures_only in ("embedded", llava):
        assert "torchcodec" not in run("doctor", pictures_only).out
    held = SimpleNamespace(video_processor=object())
    config = SimpleNamespace(model_type="own")
    assert videos_note("m", config, held).startswith(note)
    for module in (processors, _installed):
        monkeypatch.setattr(module, "has_torchcodec", lambda: True)
    monkeypatch.setattr(importlib, "import_module", unloadable)
    assert not videos_note("m", config, held)
    for command in (["env"], ["doctor", "embedded"]):
        assert "note: videos cannot be decoded by torchcodec, which is in" in run(*command).out
