"""Sequence methods where the prompt comes in chunks, or with guessed tokens after it.

The reference is the same method without chunks and guesses, which other tests compare with the
oracle. The tokens that stay, the logits and the answer are the same.
"""

from functools import partial
from typing import Any

import pytest
import torch
from conversations import IMAGE_TURN, start
from settings import flash_attention
from torch import Tensor

import plphp
from invariants import EVERY, LOGITS, generate, truth

METHODS = {
    "divprune": lambda: plphp.policy("divprune", budget=0.4),
    "vtw": lambda: plphp.policy("vtw", layer=2),
    "divprune,snapkv": lambda: [plphp.policy("divprune"), plphp.policy("snapkv", window=24)],
    "divprune,vl-cache": lambda: plphp.policy("divprune,vl-cache"),
}
INSIDE = {
    "fastv": lambda: plphp.policy("fastv", layer=2, keep=0.4),
    "dart": lambda: plphp.policy("dart", layer=2, keep=0.4),
    "fastv,plphp": lambda: [plphp.policy("fastv", layer=2), plphp.PLPHP()],
    "dart,snapkv": lambda: [plphp.policy("dart", layer=1), plphp.policy("snapkv", window=24)],
}
CHUNKS = {"prefill_chunk_size": 16}  # an image spans several chunks


def check_same(model: Any, inputs: dict[str, Tensor], policy: Any, **options: Any) -> Any:
    """The answer with these options is that without. Returns the report with them."""
    with plphp.prune(model, policy) as pruning:
        wanted, wanted_logits = generate(model, inputs)
        plain = pruning.report
        tokens, logits = generate(model, inputs, **options)
        report = pruning.report
    assert report is not plain and plain.retention < 1
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert torch.equal(layer.kept, other.kept)
    assert torch.equal(tokens, wanted)
    if logits.shape == wanted_logits.shape:
        assert (logits - wanted_logits).abs().max() < LOGITS
    assert report.retention == plain.retention
    return report


@pytest.mark.parametrize("name", [*METHODS, *INSIDE])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_chunks_change_nothing(family: str, name: str) -> None:
    expected = truth(family, 0, "batch")
    make = {**METHODS, **INSIDE}[name]
    check_same(expected.build(), expected.inputs, make(), **CHUNKS)


@pytest.mark.parametrize("name", INSIDE)
def test_layers_before_the_choice_read_the_chunks_twice_and_later_ones_once(name: str) -> None:
    expected = truth("llava", 0, "one")
    model, seen = expected.build(), [0] * 4

    def count(index: int, module: Any, args: Any, kwargs: Any) -> None:
        seen[index] += kwargs["hidden_states"].shape[1]

    layers = model.get_decoder().layers
    with plphp.prune(model, INSIDE[name]()) as pruning:
        for index, layer in enumerate(layers):
            note = partial(count, index)
            layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
        generate(model, expected.inputs, steps=1, **CHUNKS)
        whole = seen.copy()
        assert pruning.report.stages[0].layer == (at := whole.index(min(whole)))
        generate(model, expected.inputs, steps=1)
    columns = expected.inputs["input_ids"].shape[1]
    assert whole[:at] == [2 * columns] * at
    assert len(set(whole[at:])) == 1 and whole[at] < columns
    assert sum(seen) - sum(whole) < sum(whole)


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_ones_own_reads_twice(static: bool) -> None:
    expected = truth("llava", 0, "batch")
    model = expected.build()
    with plphp.prune(model, INSIDE["fastv,plphp"]()):
        wanted = generate(model, expected.inputs)[0]
        cache = plphp.PrunedCache(model, max_len=256, static=static)
        assert torch.equal(generate(model, expected.inputs, cache=cache, **CHUNKS)[0], wanted)


@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("glm4v", "one"),
        ("internvl", "batch"),
        ("smolvlm", "batch"),
        ("llava_onevision", "videos"),
        ("qwen3_5", "one"),
        ("cohere2_vision", "batch"),
    ],
)
def test_chunks_in_other_families(family: str, rows: str) -> None:
    expected = truth(family, 0, rows)
    check_same(expected.build(), expected.inputs, METHODS["divprune"](), **CHUNKS)


@pytest.mark.parametrize("name", ["cdpruner", "vidcom2"])
def test_other_methods_plan_ahead(name: str) -> None:
    expected = truth("qwen2_vl", 0, "videos")
    check_same(expected.build(), expected.inputs, plphp.policy(name), **CHUNKS)


def test_no_layer_runs_before_the_first_chunk_and_none_sees_what_was_dropped() -> None:
    expected = truth("qwen3_vl", 0, "one")
    model, seen, towers = expected.build(), [], []
    layer, tower = model.get_decoder().layers[0], model.model.visual

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"].shape[1])

    with (
        plphp.prune(model, METHODS["divprune"]()) as pruning,
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True),
        tower.register_forward_pre_hook(lambda *_: towers.append(1)),
    ):
        generate(model, expected.inputs, steps=1, **CHUNKS)
    assert len(towers) == 1
    columns = expected.inputs["input_ids"].shape[1]
    assert len(seen) == -(-columns // 16)
    kept = int((pruning.report.stages[0].stays >= 0).sum() + (expected.spans == 0).sum())
    empty = sum(count == 1 for count in seen)  # a chunk without tokens has a filler
    assert kept <= sum(seen) <= kept + empty


def test_chunks_of_a_flash_batch_hide_its_fillers() -> None:
    """FlashAttention gives only a mask (B, S), of which later chunks make their own."""
    expected = truth("llava", 0, "batch")
    with flash_attention(expected.build()) as model:
        check_same(model, expected.inputs, METHODS["divprune,snapkv"](), **CHUNKS)


@pytest.mark.parametrize("name", ["divprune,novelty", "fastv,novelty"])
@pytest.mark.parametrize("recall", [None, "host"])
def test_chunks_in_later_turns(recall: str | None, name: str) -> None:
    answers = []
    for options in ({}, CHUNKS):
        talk = start("qwen2_vl", IMAGE_TURN)
        policy = plphp.policy(name)
        talk.model.generation_config.update(**options)
        with plphp.prune(talk.model, policy, recall=recall):
            answers.append((talk.hold(plphp.PrunedCache(talk.model)), talk.logits))
    assert answers[0][0] == answers[1][0]
    for logits, wanted in zip(answers[1][1], answers[0][1], strict=True):
        assert (logits - wanted).abs().max() < LOGITS


@pytest.mark.parametrize("name", [*METHODS, *INSIDE])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_guessed_tokens_change_nothing(family: str, name: str) -> None:
    expected = truth(family, 0, "one")
    make = {**METHODS, **INSIDE}[name]
    check_same(expected.build(), expected.inputs, make(), prompt_lookup_num_tokens=3)


def test_guesses_of_an_assistant_change_nothing() -> None:
    expected = truth("llava", 0, "one")
    helper = EVERY["llava"].build(1)
    check_same(expected.build(), expected.inputs, METHODS["divprune"](), assistant_model=helper)


def test_chunks_are_refused_where_they_cannot_be_right() -> None:
    expected = truth("qwen3_5", 0, "batch")
    model = expected.build()
    with plphp.prune(model, METHODS["divprune"]()) as pruning:
        with pytest.raises(plphp.UnsupportedModeError, match="recurrent and cannot skip"):
            generate(model, expected.inputs, **CHUNKS)
        generate(model, expected.inputs)
    assert pruning.report.retention < 1
