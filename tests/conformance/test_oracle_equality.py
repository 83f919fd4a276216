"""The package against the oracle in depth: invariants 1 to 5 on one family of each kind.

`test_matrix.py` holds every family against the same checks.
"""

import gc
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from transformers import (
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
)

import oracle
import tiny
from invariants import (
    EVERY,
    KV_HEADS,
    LOGITS,
    Truth,
    attach,
    cache_for,
    check_decoding,
    check_keeping_all,
    check_rows_alone,
    check_selection,
    generate,
    kept_of,
    plphp_policy,
    run_pruned,
    state_of,
    truth,
)
from oracle import Numbers

SEEDS = (0, 1, 2)
CASES = [
    *((name, rows, seed) for name in tiny.CORE for rows in tiny.ROWS for seed in SEEDS),
    *(("idefics2_split", rows, 0) for rows in tiny.ROWS),
    *(("idefics2_window", rows, 0) for rows in ("batch", "crossing")),
]


def marked(cases: list[tuple[Any, ...]]) -> list[Any]:
    """The first seed in every run, the others with the slow tests: the matrix covers the rest."""
    return [pytest.param(*case, marks=[pytest.mark.slow] * (case[-1] > 0)) for case in cases]


every_case = pytest.mark.parametrize(("name", "rows", "seed"), marked(CASES))
every_family = pytest.mark.parametrize("name", tiny.CORE)


# --- 2. Selection and decoding equal the oracle's -------------------------------------------------


@every_case
def test_equals_the_oracle(name: str, rows: str, seed: int) -> None:
    expected = truth(name, seed, rows)
    model = EVERY[name].build(seed)
    tokens, logits, report = run_pruned(model, expected.inputs, expected.numbers)
    classes = {row.layer_class for layer in expected.select().choices for row in layer}
    assert classes - {None} == {"attentive", "balanced", "indifferent"}, "nothing is told apart"
    check_selection(expected, report)
    check_decoding(model, expected, tokens, logits, report)
    assert (logits - expected.logits).abs().max() > LOGITS, "pruning had no effect at all"


@pytest.mark.parametrize(
    "options",
    [
        {"budget": "global"},
        {"gqa": "max"},
        {"min_tokens": 9},
        {"round_to": 16},
        {"budget": "global", "gqa": "max", "min_tokens": 5, "round_to": 8},
    ],
    ids="+".join,
)
@every_family
def test_options_equal_the_oracle(name: str, options: dict[str, object]) -> None:
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    numbers = replace(expected.numbers, **options)
    tokens, logits, report = run_pruned(model, expected.inputs, numbers)
    check_selection(expected, report, **options)
    check_decoding(model, expected, tokens, logits, report)


@pytest.mark.parametrize("name", ["llava", "idefics2", "idefics2_split"])
def test_mantis_with_five_interleaved_images_is_really_pruned(name: str) -> None:
    """SigLIP + Llama 3 in the LLaVA class, and Idefics2, whose default config slides everywhere."""
    expected = truth(name, 0, "five")
    model = EVERY[name].build(0)
    tokens, logits, report = run_pruned(model, expected.inputs, Numbers(r=0.2, delta_r=0.0))
    assert report.images == (5,)
    assert report.notes == ()
    for layer in report.layers:
        assert layer.pruned
        assert layer.retention == pytest.approx(0.2, abs=0.03)
    check_decoding(model, expected, tokens, logits, report)


# --- 1. Keeping all is the untouched model --------------------------------------------------------


@every_case
def test_keeping_all_is_the_untouched_model(name: str, rows: str, seed: int) -> None:
    check_keeping_all(truth(name, seed, rows), EVERY[name].build(seed))


# --- 3. A row of a padded batch is the row alone --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seed"), marked([(name, seed) for name, rows, seed in CASES if rows == "batch"])
)
def test_a_row_of_a_batch_is_the_row_alone(name: str, seed: int) -> None:
    expected = truth(name, seed, "batch")
    model = EVERY[name].build(seed)
    run = run_pruned(model, expected.inputs, expected.numbers)

    def excuse(report: Any) -> bool:
        return not oracle.compare(expected.select(), kept_of(report)).wrong

    check_rows_alone(expected, model, plphp_policy(expected.numbers), run, excuse)


@every_family
def test_a_text_only_prompt_is_left_alone_and_said_so(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    inputs, _ = family.make_inputs(model, [tiny.NONE], seed=0)
    tokens, logits = generate(model, inputs)
    pruned, pruned_logits, report = run_pruned(model, inputs, Numbers())
    assert torch.equal(pruned, tokens)
    assert (pruned_logits - logits).abs().max() < LOGITS
    assert all((layer == -1).all() for layer in kept_of(report))


# --- 4. Bytes reported are bytes allocated --------------------------------------------------------


CODE = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def reachable_tensors(root: object, report: object) -> Iterator[Tensor]:
    """All tensors that an object leads to; not through its report, a model, a config or code.

    Found by the garbage collector: nothing is assumed of how the package lays its cache out.
    """
    outside = (torch.nn.Module, PreTrainedConfig, type(report), type, weakref.ref, *CODE)
    todo, seen = [root], set()
    while todo:
        item = todo.pop()
        if id(item) in seen or issubclass(type(item), outside):
            continue
        seen.add(id(item))
        if issubclass(type(item), Tensor):
            yield item
        else:
            todo += gc.get_referents(item)


def bytes_of_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address: size. Views share a storage, which counts once and whole."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


@pytest.mark.parametrize("rows", tiny.ROWS)
@pytest.mark.parametrize("name", [*tiny.CORE, *tiny.VARIANTS])
def test_reported_bytes_are_allocated_bytes(name: str, rows: str) -> None:
    expected = truth(name, 0, rows)
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        kv = cache_for(model)
        generate(model, expected.inputs, steps=1, past_key_values=kv)
        tensors = reachable_tensors(kv, kv.report)
        assert kv.report.kv_bytes == sum(bytes_of_storages(tensors).values())
        assert kv.report.kv_bytes < kv.report.kv_bytes_full
    batch, length = expected.spans.shape
    head_dim = tiny.TEXT["hidden_size"] // tiny.TEXT["num_attention_heads"]
    entries = batch * length * tiny.TEXT["num_hidden_layers"] * KV_HEADS * head_dim
    assert kv.report.kv_bytes_full == 2 * 4 * entries, "keys and values in float32"


@every_family
def test_what_is_dropped_is_freed(name: str) -> None:
    """Beside the cache nothing new is alive that could be a layer's keys of the whole prompt."""
    expected = truth(name, 0, "three")
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        generate(model, expected.inputs)
        older = live_tensors()  # held, so that no address is used again
        kv = cache_for(model)
        generate(model, expected.inputs, steps=1, past_key_values=kv)
        own = bytes_of_storages([*older, *reachable_tensors(kv, kv.report)])
        new = bytes_of_storages(live_tensors())
    layer_keys = kv.report.kv_bytes_full / tiny.TEXT["num_hidden_layers"] / 2
    assert [
        size for address, size in new.items() if address not in own and size >= layer_keys
    ] == []


def live_tensors() -> list[Tensor]:
    """Tensors with memory of their own: those that a compiler left behind have none."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return [tensor for tensor in found if not isinstance(tensor, FakeTensor)]


@every_family
def test_a_report_keeps_no_cache_tensor_alive(name: str) -> None:
    expected = truth(name, 0, "three")
    model = EVERY[name].build(0)
    with attach(model, expected.numbers):
        kv = cache_for(model)
        generate(model, expected.inputs, past_key_values=kv)
    report = kv.report
    tensors = [weakref.ref(t) for t in reachable_tensors(kv, report) if t.is_floating_point()]
    assert tensors
    del kv
    gc.collect()
    assert [ref().shape for ref in tensors if ref() is not None] == []
    assert str(report)


# --- 5. The model is as it was --------------------------------------------------------------------


class Interruption(Exception):
    pass


class Interrupt(StoppingCriteria):
    """Raises in the middle of generation."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise Interruption
        return torch.zeros(len(input_ids), dtype=torch.bool)


class InterruptLogits(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise Interruption
        return scores


def leave_the_with(model: PreTrainedModel, truth: Truth) -> None:
    run_pruned(model, truth.inputs, truth.numbers)


def remove(model: PreTrainedModel, truth: Truth) -> None:
    pruning = attach(model, truth.numbers)
    generate(model, truth.inputs)
    pruning.remove()


def never_used(model: PreTrainedModel, truth: Truth) -> None:
    with attach(model, truth.numbers):
        pass


def raise_in_a_stopping_criterion(model: PreTrainedModel, truth: Truth) -> None:
    interrupted(model, truth, stopping_criteria=[Interrupt(truth.spans.shape[1] + 5)])


def raise_in_a_logits_processor(model: PreTrainedModel, truth: Truth) -> None:
    interrupted(model, truth, logits_processor=[InterruptLogits(truth.spans.shape[1] + 5)])


def interrupted(model: PreTrainedModel, truth: Truth, **kwargs: object) -> None:
    with pytest.raises(Interruption), attach(model, truth.numbers):
        generate(model, truth.inputs, **kwargs)


@pytest.mark.parametrize(
    "leave",
    [
        leave_the_with,
        remove,
        never_used,
        raise_in_a_stopping_criterion,
        raise_in_a_logits_processor,
    ],
)
@every_family
def test_the_model_is_as_it_was(name: str, leave: Callable[[PreTrainedModel, Truth], None]) -> None:
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    tokens, logits = generate(model, expected.inputs)  # transformers itself sets things lazily
    before = state_of(model)
    leave(model, expected)
    assert "generate" not in vars(model)
    after = state_of(model)
    assert {key: after.get(key) for key in before} == before
    assert after.keys() == before.keys()
    again, logits_again = generate(model, expected.inputs)
    assert torch.equal(again, tokens)
    assert torch.equal(logits_again, logits)


@every_family
def test_it_goes_on_after_an_interruption(name: str) -> None:
    """What an interrupted call leaves behind does not reach the next one."""
    expected = truth(name, 0, "batch")
    model = EVERY[name].build(0)
    clean, clean_logits, _ = run_pruned(model, expected.inputs, expected.numbers)
    stop = [Interrupt(expected.spans.shape[1] + 5)]
    with attach(model, expected.numbers) as pruning:
        with pytest.raises(Interruption):
            generate(model, expected.inputs, stopping_criteria=stop)
        tokens, logits = generate(model, expected.inputs)
        check_selection(expected, pruning.report)
    assert torch.equal(tokens, clean)
    assert (logits - clean_logits).abs().max() < LOGITS


@every_family
def test_a_second_model_of_the_same_config_object_is_not_met(name: str) -> None:
    family, expected = EVERY[name], truth(name, 0, "batch")
    config = family.config()
    attached, bystander = family.build(0, config), family.build(1, config)
    assert attached.config is bystander.config
    tokens, logits = generate(bystander, expected.inputs)
    before = state_of(bystander)
    with attach(attached, expected.numbers) as pruning:
        assert state_of(bystander) == before
        for model in (bystander, attached, bystander):  # before the first pruned call, and after
            own, own_logits = generate(model, expected.inputs)
            if model is bystander:
                assert torch.equal(own, tokens)
                assert torch.equal(own_logits, logits)
        check_selection(expected, pruning.report)
        third = family.build(1, config)
        assert torch.equal(generate(third, expected.inputs)[0], tokens)
