"""Weights that the files lack, that have no place in the model, and that are not numbers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from plphp import inputs
from plphp.demo.model import WEIGHTS
from plphp.demo.model import load as load_embedded
from plphp.errors import InputError
from plphp.inputs import models
from plphp.weights import check_complete

LAYER = "model.language_model.layers.2."
TABLE = "model.language_model.embed_tokens.weight"
NAMED = f"lack 12 weights ({LAYER}input_layernorm.weight, {LAYER}mlp.down_proj.weight, ...)"


def without(folder: Path, lost: Callable[[str], bool]) -> Path:
    """The embedded model's files, without the weights for whose names `lost` is true."""
    shutil.copytree(WEIGHTS, folder)
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not lost(name)}
    save_file(kept, file, {"format": "pt"})
    return folder


@pytest.fixture
def lacking(tmp_path: Path) -> Path:
    return without(tmp_path / "lacking", lambda name: ".layers.2." in name)


@pytest.mark.parametrize(
    "words",
    [["generate", "--prompt", "x"], ["generate", "--prompt", "x", "--weights", "int8"],
     ["generate", "--prompt", "x", "--weights", "int4"],
     ["inspect", "--image", "PICTURE", "--prompt", "x"],
     ["bench", "--context", "64"], ["eval", "--limit", "1", "--tasks", "easyvqa", "--out", "e"],
     ["demo", "--prompt", "x"]],
    ids=["generate", "int8", "int4", "inspect", "bench", "eval", "demo"],
)  # fmt: skip
def test_a_layer_that_the_files_lack(
    words: list[str], lacking: Path, picture: str, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(lacking.parent)
    words = [picture if word == "PICTURE" else word for word in words]
    result = run(*words, "--model", lacking)
    assert result.code == 2 and not result.out, result.out
    assert f"plphp: cannot load {lacking}: its files {NAMED}" in result.err
    assert "complete the checkpoint" in result.err


def test_a_batch_of_an_incomplete_model(lacking: Path, tmp_path: Path, run: Callable) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps({"images": [], "prompt": "hello"}))
    asked = ["--batch", tmp_path / "lines.jsonl", "--out", tmp_path / "out.jsonl"]
    result = run("generate", "--model", lacking, *asked)
    assert result.code == 2 and NAMED in result.err


def test_the_embedded_model_of_a_directory(lacking: Path) -> None:
    with pytest.raises(InputError, match="lack 12 weights"):
        load_embedded(path=lacking)


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_table_that_is_tied_to_a_head_is_not_found_elsewhere(
    weights: str | None, tmp_path: Path
) -> None:
    folder = without(tmp_path / "headless", lambda name: "embed_tokens" in name)
    with pytest.raises(InputError, match=rf"lack . weights? \(.*{TABLE}"):
        inputs.load(str(folder), "auto", "cpu", weights=weights)


def test_weights_without_a_place(tmp_path: Path, picture: str, run: Callable) -> None:
    folder = tmp_path / "more"
    shutil.copytree(WEIGHTS, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] -= 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    told = "the model has no place for 12 weights (model.language_model.layers.7.input_layernorm."
    result = run("generate", "--model", folder, "--image", picture, "--prompt", "what is it?")
    assert result.code == 0 and f"warning: {folder}: {told}" in result.err
    result = run("bench", "--model", folder, "--context", 64, "--images", 1, "--rounds", 1)
    assert result.code == 0 and f"warning: {folder}: {told}" in result.err
    with pytest.warns(UserWarning, match="no place for 12 weights"):
        inputs.load(str(folder), "auto", "cpu")


def test_weights_that_are_no_numbers(tmp_path: Path, picture: str, run: Callable) -> None:
    folder = tmp_path / "nan"
    shutil.copytree(WEIGHTS, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = "the attention of layers 3 to 7 is not a number: the answer cannot be trusted"
    asked = ["generate", "--model", folder]
    result = run(*asked, "--image", picture, "--prompt", "what is it?", "--max-new-tokens", 2)
    assert result.code == 0 and said in result.err and "all pruned layers" not in result.err
    (tmp_path / "lines.jsonl").write_text(json.dumps({"images": [picture], "prompt": "hello"}))
    out = tmp_path / "out.jsonl"
    result = run(*asked, "--batch", tmp_path / "lines.jsonl", "--out", out)
    assert result.code == 3 and said in result.err
    assert json.loads(out.read_text())["error"] == said


ALL = {**tiny.FAMILIES, **tiny.VARIANTS, **tiny.DECODERS}


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("family", [name for name, one in ALL.items() if one.available])
def test_whole_files_are_loaded_without_a_remark(
    family: str, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_reader", lambda *told: lambda model: SimpleNamespace(model=model))
    ALL[family].build(0).save_pretrained(tmp_path)
    remarks: list[str] = []
    models.load(str(tmp_path), "auto", "cpu", weights=weights, tell=remarks.append)
    assert not remarks


def test_what_only_may_be_missing_is_told() -> None:
    """Buffers have a value of their own, and a foreign quantizer may store a weight in others."""
    found: dict[str, Any] = {"missing_keys": {"running_mean"}, "unexpected_keys": set()}
    remarks: list[str] = []
    check_complete("m", torch.nn.BatchNorm1d(2), found, remarks.append)
    assert remarks == [
        "m: its files lack 1 weight (running_mean): they have the value of a new model"
    ]
    quantised = torch.nn.Linear(2, 2)
    quantised.hf_quantizer = object()
    check_complete("m", quantised, {**found, "missing_keys": {"weight"}}, remarks.append)
    assert "or its quantizer makes them" in remarks[1]
