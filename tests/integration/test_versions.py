"""The cache keyword under both of its names, and transformers versions that plphp cannot attach to.

The suite turns warnings into errors, so each of these also runs without one.
"""

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLAttention

import plphp
import tiny
from plphp.hf import compat
from versions import CACHE

QWEN = tiny.FAMILIES["qwen2_vl"]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model() -> Any:
    return QWEN.build(0)


def prompt(model: Any) -> dict[str, torch.Tensor]:
    inputs: dict[str, torch.Tensor] = QWEN.make_inputs(model, [tiny.RowSpec(1, 20)], 0)[0]
    return inputs


def test_the_name_is_the_one_that_the_installed_version_uses() -> None:
    assert compat.CACHE == CACHE


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_generate_takes_a_cache_by_either_name(model: Any, name: str) -> None:
    inputs = prompt(model)
    with plphp.prune(model) as pruning:
        wanted = model.generate(**inputs, **GREEDY)
        report = pruning.report.to_dict()
        cache = plphp.PrunedCache(model)
        assert torch.equal(model.generate(**inputs, **GREEDY, **{name: cache}), wanted)
        assert cache.report.to_dict() == report
        assert cache.get_seq_length() == wanted.shape[1] - 1


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_bare_forward_takes_a_cache_by_either_name(model: Any, name: str) -> None:
    inputs = prompt(model)
    with plphp.prune(model), torch.no_grad():
        wanted = model.generate(**inputs, **GREEDY)
        cache = plphp.PrunedCache(model)
        out = model(**inputs, **{name: cache})
        ids = inputs["input_ids"]
        for _ in range(GREEDY["max_new_tokens"]):
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            out = model(token, **{name: cache})
        assert compat.given_cache(out) is cache
    assert torch.equal(ids, wanted)


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_foreign_caches_are_refused_by_either_name(model: Any, name: str) -> None:
    foreign = transformers.DynamicCache(config=model.config.get_text_config())
    with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="PrunedCache"):
        model.generate(**prompt(model), **GREEDY, **{name: foreign})


def test_a_version_that_renames_the_keyword_again_is_blamed(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "CACHE_NAMES", ("a_name_of_the_future",))
    with pytest.raises(plphp.UnsupportedTransformersError) as refused:
        plphp.prune(model)
    assert transformers.__version__ in str(refused.value)
    assert f"pip install 'transformers{compat.BOUNDS}'" in str(refused.value)
    assert "generate" not in vars(model), "nothing was changed"


def test_a_model_without_a_seam_is_blamed_where_the_version_has_one(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2VLAttention, "forward", lambda self, hidden_states: None)
    with pytest.raises(plphp.UnsupportedModelError, match="qwen2_vl"):
        plphp.prune(model)


@pytest.mark.parametrize(
    ("version", "refused"), [("5.15.9", True), ("5.16.0", False), ("5.99.0", False)]
)
def test_old_versions_are_refused_and_untested_ones_are_tried(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    monkeypatch.setattr(compat.transformers, "__version__", version)
    if not refused:
        compat.check_version()
        return
    with pytest.raises(plphp.UnsupportedTransformersError) as error:
        compat.check_version()
    assert version in str(error.value) and compat.BOUNDS in str(error.value)


def test_a_version_that_lacks_a_registry_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(transformers.cache_utils, "get_layer_types_and_kwargs")
    with pytest.raises(plphp.UnsupportedTransformersError, match="get_layer_types_and_kwargs"):
        compat.check_version()


def test_the_suite_runs_on_a_version_that_is_supported() -> None:
    assert Version(transformers.__version__) >= compat.OLDEST
