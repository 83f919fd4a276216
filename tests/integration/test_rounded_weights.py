"""Models with rounded weights: loaded from disk, pruned, with recall and with codes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import plphp
from along import check_greedy, check_logits, led
from invariants import generate, plphp_policy, truth
from plphp.demo.model import WEIGHTS
from plphp.demo.model import load as load_embedded
from plphp.errors import InputError
from plphp.inputs import load
from plphp.weights import round_weights, weight_bytes


def rounded_model(expected: Any, bits: int) -> Any:
    model = expected.build()
    round_weights(model, bits)
    return model


@pytest.mark.parametrize(
    "how", [{}, {"kv_bits": 4}, {"recall": "int4"}], ids=["full", "codes", "int4"]
)
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_pruning_of_a_rounded_model(family: str, how: dict[str, Any]) -> None:
    """What is pruned does not depend on how the weights are stored: the oracle runs on them too."""
    expected = truth(family, 0, "batch")
    model = rounded_model(expected, 4)
    with plphp.prune(model, plphp_policy(expected.numbers), **how) as pruning:
        tokens, logits = generate(model, expected.inputs)
    assert (logits[:, 0] - expected.logits[:, 0]).abs().max() > 1e-3, "the weights are rounded"
    report = pruning.report
    wanted = led(rounded_model(expected, 4), expected.inputs, expected.spans, report, tokens)
    check_logits(logits, wanted, report)
    check_greedy(tokens, wanted, report)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "embedded"
    shutil.copytree(WEIGHTS, made)
    return made


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_are_rounded_while_they_are_loaded(
    weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plphp.inputs import rounding

    left = []

    def counted(model: Any, bits: int) -> None:
        left.append([n for n, m in model.named_modules() if type(m) is nn.Linear])
        round_weights(model, bits)

    monkeypatch.setattr(rounding, "round_weights", counted)
    model = load(str(folder), "auto", "cpu", weights=weights).model
    assert left == [["lm_head"]], "all but the head, which may be tied, were rounded on the way"
    other = load_embedded(torch.bfloat16).model
    full = weight_bytes(other)
    round_weights(other, 8 if weights == "int8" else 4)
    ids = torch.arange(5, 40)[None]
    assert torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    most = 0.55 if weights == "int8" else 0.4  # of bfloat16
    assert weight_bytes(model) == weight_bytes(other) < most * full
    assert not hasattr(model.config, "quantization_config")
    assert model.dtype == torch.bfloat16


def test_a_quantised_checkpoint_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from plphp.inputs import models

    config = models.load_config(str(folder))
    config.quantization_config = {"quant_method": "gptq"}
    monkeypatch.setattr(models, "load_config", lambda *_: config)
    with pytest.raises(InputError, match="quantised already"):
        load(str(folder), "auto", "cpu", weights="int4")
