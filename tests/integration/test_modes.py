"""Details of ways to generate that the matrix (tests/conformance) does not test.

With a policy that keeps everything, every mode equals the untouched model. With pruning, modes that
only differ in how tokens are requested equal plain generate().
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

import plphp
import tiny
from plphp.cache import KVStore

FAMILIES = ("qwen2_vl", "llava", "llava_onevision", "idefics2")
KEEP_ALL = plphp.PLPHP(r=1, delta_r=0)
SOME = plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5)
GREEDY = {"max_new_tokens": 8, "do_sample": False}

INSTALLED = Version(transformers.__version__)
right_beams = pytest.mark.skipif(
    Version("5.19") > INSTALLED,
    reason="this transformers hands the beams of one row the images of another",
)
every_family = pytest.mark.parametrize("name", FAMILIES)


def case(name: str, rows: str = "batch") -> tuple[Any, dict[str, Tensor]]:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    return model, family.make_inputs(model, tiny.ROWS[rows], 0)[0]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(7)
    out: Tensor = model.generate(**{**GREEDY, **inputs, **options})
    return out


class Banned(LogitsProcessor):
    """Forbids the token of greedy decoding at every third step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 3:
            return scores
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "beams": lambda: {"num_beams": 3},
    "sampled beams": lambda: {"num_beams": 3, "do_sample": True},
    "return sequences": lambda: {"do_sample": True, "num_return_sequences": 2},
    "beams returned": lambda: {"num_beams": 4, "num_return_sequences": 2},
    "processor": lambda: {"logits_processor": LogitsProcessorList([Banned()])},
    "criteria": lambda: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(110)])},
    "repetition": lambda: {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "cache dynamic": lambda: {"cache_implementation": "dynamic"},
    "config": lambda: {
        "generation_config": GenerationConfig(
            cache_implementation="dynamic", max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    },
}


@pytest.mark.parametrize("mode", MODES)
@every_family
def test_keep_all_in_every_mode_is_the_untouched_model(name: str, mode: str) -> None:
    model, inputs = case(name)
    wanted = generate(model, inputs, **MODES[mode]())
    with plphp.prune(model, KEEP_ALL) as pruning:
        assert torch.equal(generate(model, inputs, **MODES[mode]()), wanted)
    assert pruning.report.retention == 1.0


@right_beams
@every_family
def test_beams_prune_as_greedy_does_and_report_expanded_rows(name: str) -> None:
    model, inputs = case(name)
    with plphp.prune(model, SOME) as pruning:
        generate(model, inputs)
        single = pruning.report
        generate(model, inputs, num_beams=3)
        for one, many in zip(single.layers, pruning.report.layers, strict=True):
            assert torch.equal(many.kept, one.kept.repeat_interleave(3, dim=0))
            assert many.layer_class == tuple(c for c in one.layer_class for _ in range(3))
    assert single.retention < 1


@right_beams
@every_family
def test_pruned_beams_of_a_batch_are_those_of_its_rows(name: str) -> None:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    rows = tiny.ROWS["batch"]
    with plphp.prune(model, SOME):
        together, _ = family.make_inputs(model, rows, 0)
        batch = generate(model, together, num_beams=3)[:, together["input_ids"].shape[1] :]
        for row, spec in enumerate(rows):
            alone, _ = family.make_inputs(model, [spec], 0)
            got = generate(model, alone, num_beams=3)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(got, batch[row])


@pytest.mark.skipif(
    Version("5.23") > INSTALLED,
    reason="this transformers cannot read prompts with pixels in chunks",
)
@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@every_family
def test_chunks_are_pruned_once_by_the_prompts_last_token(name: str, size: int) -> None:
    model, inputs = case(name, "three")
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
        whole = pruning.report
        assert torch.equal(generate(model, inputs, prefill_chunk_size=size), wanted)
    for one, many in zip(whole.layers, pruning.report.layers, strict=True):
        assert torch.equal(one.kept, many.kept)
        assert one.gamma == pytest.approx(many.gamma, abs=1e-5)


@every_family
def test_eager_prefill_prunes_as_sdpa_does(name: str) -> None:
    model, inputs = case(name)
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
        by_sdpa = pruning.report
        model.set_attn_implementation("eager")  # while attached, since it is read at every call
        assert torch.equal(generate(model, inputs), wanted)
    for one, other in zip(by_sdpa.layers, pruning.report.layers, strict=True):
        assert torch.equal(one.kept, other.kept)


def test_the_first_forward_of_prompt_lookup_contains_guessed_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The mode "prompt lookup" of the matrix depends on it."""
    model, inputs = case("llava", "three")
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, 1:3]
    columns: list[int] = []
    split = KVStore.split

    def noted(store: KVStore, guesses: int) -> tuple[Tensor, Tensor]:
        columns.append(guesses)
        return split(store, guesses)

    monkeypatch.setattr(KVStore, "split", noted)
    with plphp.prune(model, SOME):
        generate(model, inputs, prompt_lookup_num_tokens=3)
    assert columns == [3] * len(columns) != []
