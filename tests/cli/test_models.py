"""Models by name: what the weights have, what the config says, and what a model cannot read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plphp import inputs
from plphp.demo.model import WEIGHTS, load
from plphp.errors import InputError
from plphp.inputs import models


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's weights as bfloat16, in a directory of the user's."""
    folder: Path = tmp_path_factory.mktemp("models") / "connect out of memory"
    shutil.copytree(WEIGHTS, folder)
    load(torch.bfloat16).model.save_pretrained(folder)
    return folder


def test_weights_are_loaded_as_they_are(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_torchvision", lambda: False)
    loaded = inputs.load(str(half), "auto", "cpu", "eager")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.model.config._attn_implementation == "eager"
    assert inputs.load(str(half), "float32", "cpu").model.dtype == torch.float32
    with pytest.raises(InputError, match="this model needs torchvision to read videos"):
        inputs.make_inputs(loaded, [], "what is this?", ["a.mp4"])
    with pytest.raises(InputError, match="the embedded model reads pictures"):
        inputs.make_inputs(load(), [], "what is this?", ["a.mp4"])


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            ImportError("X requires the Torchvision library. See"),
            "torchvision==0.28.",
        ),
        (
            ImportError("X requires the timm library but. You can `pip install timm`"),
            "torchvision==0.28.",
        ),
        (ValueError("This needs it. Install it with `pip install accelerate`."), "accelerate"),
        (
            OSError("Can't load image processor for 'x'. If you"),
            "processor_config.json, or preprocessor_config.json of older models",
        ),
        (
            OSError("Can't load video processor for 'x'. If you"),
            "or video_preprocessor_config.json",
        ),
    ],
)
def test_what_transformers_lacks_comes_with_a_remedy(
    error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "has_torchvision", lambda: False)
    said = models._refusal("some/model", error)
    assert said.startswith("cannot load some/model: ") and remedy in said
    assert remedy not in models._refusal("some/model", type(error)("Something else."))


@pytest.mark.parametrize(
    ("offline", "says"),
    [(True, "is not asked: check the name, or unset HF_HUB_OFFLINE"),
     (False, "cannot be reached: check the name and the network")],
)  # fmt: skip
def test_a_hub_that_does_not_answer(
    offline: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    from plphp.inputs.models import _refusal

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    said = _refusal("someone/some-vlm", OSError("We couldn't connect to the hub"))
    assert said.endswith(f"and the hub {says}")


def test_an_unknown_kind_of_device(run: Callable, picture: str) -> None:
    result = run("generate", "--device", "gpu", "--image", picture, "--prompt", "x")
    assert "torch knows no such device: give cpu, cuda, cuda:1 or mps, or leave" in result.err


def test_a_model_without_its_option_is_understood(run: Callable) -> None:
    result = run("generate", "some/model", "--prompt", "x")
    assert result.code == 2 and "--model NAME" in result.err


def test_auto_spreads_the_layers(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForImageTextToText

    told: dict[str, object] = {}

    def from_pretrained(name: str, **options: object) -> tuple[object, dict]:
        told.update(options)
        return torch.nn.Linear(1, 1), {"missing_keys": [], "unexpected_keys": []}

    monkeypatch.setattr(models, "has_torchvision", lambda: False)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    inputs.load(str(half), "auto", "auto")
    assert told["device_map"] == "auto"


@pytest.mark.parametrize(
    ("command", "part"),
    [("generate", "text_config"), ("inspect", "vision_config"), ("bench", "vision_config"),
     ("doctor", "vision_config"), ("eval", "vision_config")],
)  # fmt: skip
def test_more_layers_than_a_model_has(
    command: str, part: str, half: Path, tmp_path: Path, run: Callable
) -> None:
    config = json.loads((half / "config.json").read_text())
    config[part]["num_hidden_layers" if part == "text_config" else "depth"] = 100_000
    config[part].pop("layer_types", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = {"generate": ["--prompt", "x"], "eval": ["--out", tmp_path / "e", "--limit", 1]}
    model = [tmp_path] if command == "doctor" else ["--model", tmp_path]
    result = run(command, *model, *words.get(command, []))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "100,000" in result.err


@pytest.mark.parametrize(
    "config",
    [b"", b"{", b"[]", b"[" * 100_000, b'"text"', b"\xff\xfe", b'{"model_type": []}',
     b'{"model_type": "qwen2_vl", "text_config": 3}',
     b'{"model_type": "llava", "vision_config": 1}',
     b'{"model_type": "qwen2_vl", "num_hidden_layers": "many"}'],
)  # fmt: skip
def test_configs_that_cannot_be_read(
    config: bytes, half: Path, tmp_path: Path, run: Callable
) -> None:
    folder = tmp_path / "offline"
    folder.mkdir()
    (folder / "config.json").write_bytes(config)
    result = run("generate", "--model", folder, "--prompt", "x")
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    assert "offline" in result.err and "the hub is not asked" not in result.err


def test_what_a_processor_leaves_out_is_refused(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = load()
    whole = type(embedded).inputs

    def forgetful(self: object, images: list, question: str) -> object:
        return whole(self, images[:1], question)  # type: ignore[arg-type]

    inputs.make_inputs(embedded, [picture, picture], "describe picture 1.")
    monkeypatch.setattr(type(embedded), "inputs", forgetful)
    inputs.make_inputs(embedded, [picture], "describe picture 1.")
    with pytest.raises(InputError, match=r"a1\.png: the model's processor leaves it out"):
        inputs.make_inputs(embedded, [picture, picture], "describe picture 1.")


@pytest.mark.parametrize("prompt", ["a <|image_pad|> b", "<|video_pad|>"])
def test_marks_of_the_model_are_refused(
    prompt: str, run: Callable, picture: str, tmp_path: Path
) -> None:
    options = ("--prompt", prompt)
    tried = (
        ("generate", *options),
        ("generate", "--image", picture, *options),
        ("inspect", "--image", picture, *options),
        ("eval", "--out", tmp_path / "e", "--images", Path(picture).parent, *options),
    )
    for words in tried:
        result = run(*words)
        assert result.code == 2 and result.err.count("\n") <= 2
        assert f"the prompt contains {prompt.split()[-2 if ' ' in prompt else 0]}" in result.err
