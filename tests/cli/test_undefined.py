"""A model whose numbers are not numbers: all ways answer alike, so that all would look right."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plphp.demo.model import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with one weight that is not a number, in layer 1."""
    folder: Path = tmp_path_factory.mktemp("undefined")
    embedded = load(torch.float32)
    embedded.model.get_decoder().layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    for part in (embedded.model, embedded.tokenizer, embedded.image_processor):
        part.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("demo", "--prompt", "read picture 1.", "--max-new-tokens", 2), "layers 2 to 7 is not a"),
        (("eval", "--tasks", "difference", "--limit", 1, "--methods", "random"), "not numbers"),
    ],
    ids=["demo", "eval"],
)
def test_nothing_is_compared(
    command: tuple[str, ...], said: str, run: Callable, folder: Path, tmp_path: Path, picture: str
) -> None:
    options = ("--out", tmp_path) if command[0] == "eval" else ("--image", picture)
    found = run(*command, "--model", folder, *options)
    assert found.code == 2 and said in found.err, found.err
    assert found.err.rstrip().endswith("Try --dtype float32, or other weights")
