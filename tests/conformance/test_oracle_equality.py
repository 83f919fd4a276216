"""The package against the oracle: what it selects, what it decodes, what it leaves behind.

Invariants 1 to 5 of the definition, through the public API alone.
"""

import gc
import math
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    StoppingCriteria,
)

import oracle
import tiny
from oracle import Numbers

STEPS = 16
SEEDS = (0, 1, 2)
KV_HEADS = tiny.TEXT["num_key_value_heads"]
EVERY = {**tiny.FAMILIES, **tiny.VARIANTS}
ROWS = {**tiny.ROWS, "crossing": tiny.CROSSING}
CASES = [
    *((name, rows, seed) for name in tiny.CORE for rows in tiny.ROWS for seed in SEEDS),
    *(("idefics2_split", rows, 0) for rows in tiny.ROWS),
    *(("idefics2_window", rows, 0) for rows in ("batch", "crossing")),
]
LOGITS = 1e-4
EXEMPT = 0.02

every_case = pytest.mark.parametrize(("name", "rows", "seed"), CASES)
every_family = pytest.mark.parametrize("name", tiny.CORE)


# --- what the oracle and the untouched model say --------------------------------------------------


@dataclass(frozen=True)
class Truth:
    inputs: dict[str, Tensor]
    spans: Tensor
    probabilities: list[Tensor]
    numbers: Numbers
    tokens: Tensor  # of the untouched model
    logits: Tensor

    def select(self, **options: object) -> oracle.Selection:
        numbers = replace(self.numbers, **options)
        return oracle.select(self.probabilities, self.spans, numbers, KV_HEADS)


@cache
def truth(name: str, seed: int, rows: str) -> Truth:
    model = EVERY[name].build(seed)
    inputs, spans = EVERY[name].make_inputs(model, ROWS[rows], seed)
    probabilities = oracle.prefill(model, inputs)
    tokens, logits = generate(model, inputs)
    numbers = thresholds(oracle.select(probabilities, spans, Numbers(), KV_HEADS))
    return Truth(inputs, spans, probabilities, numbers, tokens, logits)


def thresholds(selection: oracle.Selection) -> Numbers:
    """alpha and beta between the model's own gammas, so that layers of all three classes occur."""
    gammas = sorted(g for layer in selection.choices for row in layer if (g := row.gamma) >= 0)
    third = max(1, len(gammas) // 3)
    return Numbers(
        r=0.4,
        delta_r=0.3,
        alpha=(gammas[-third - 1] + gammas[-third]) / 2,
        beta=(gammas[third - 1] + gammas[third]) / 2,
    )


def generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = STEPS, **kwargs: object
) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


# --- what the package says ------------------------------------------------------------------------


def attach(model: PreTrainedModel, numbers: Numbers) -> Any:
    """The package's handle; options at their defaults are left to it."""
    import plphp

    always = ("r", "delta_r", "alpha", "beta")
    given = {
        key: value
        for key, value in asdict(numbers).items()
        if key in always or value != getattr(Numbers(), key)
    }
    return plphp.prune(model, plphp.PLPHP(**given))


def cache_for(model: PreTrainedModel) -> Any:
    import plphp

    return plphp.PrunedCache(model)


def run_pruned(
    model: PreTrainedModel, inputs: dict[str, Tensor], numbers: Numbers
) -> tuple[Tensor, Tensor, Any]:
    """(tokens, logits, report) of a generate() while the model is attached."""
    with attach(model, numbers) as pruning:
        tokens, logits = generate(model, inputs)
        return tokens, logits, pruning.report


def kept_of(report: Any) -> list[Tensor]:
    return [layer.kept for layer in report.layers]


def per_row(values: Any) -> list[float]:
    """A report's numbers, one a row, in a tensor or a sequence: None is NaN."""
    return [math.nan if value is None else float(value) for value in values]


def class_name(value: Any) -> str | None:
    """Whether a report says attentive, vision-attentive or an enum of them."""
    value = getattr(value, "value", value)
    return None if value is None else str(value).lower().removeprefix("vision-")


def check_selection(truth: Truth, report: Any, **options: object) -> None:
    selection = truth.select(**options)
    for layer, (choices, reported) in enumerate(zip(selection.choices, report.layers, strict=True)):
        where = f"layer {layer}"
        gammas = [row.gamma for row in choices]
        assert per_row(reported.gamma) == pytest.approx(gammas, abs=1e-5, nan_ok=True), where
        sure = [row for row, choice in enumerate(choices) if not choice.near_threshold]
        classes, rates = list(map(class_name, reported.layer_class)), per_row(reported.rate)
        for row in sure:
            assert classes[row] == choices[row].layer_class, f"{where}, row {row}"
            rate = math.nan if choices[row].rate is None else choices[row].rate
            assert rates[row] == pytest.approx(rate, abs=1e-6, nan_ok=True), f"{where}, row {row}"
    verdict = oracle.compare(selection, kept_of(report))
    assert not verdict.wrong, "\n".join(verdict.wrong)
    assert verdict.share <= EXEMPT


def check_decoding(
    model: PreTrainedModel, truth: Truth, tokens: Tensor, logits: Tensor, report: Any
) -> None:
    """Given the reported selection: the oracle is led along the tokens, so each step compares."""
    _, expected = oracle.decode(
        model, truth.inputs, truth.spans, kept_of(report), STEPS, tokens=tokens
    )
    assert (logits - expected).abs().max() < LOGITS
    assert torch.equal(tokens, expected.argmax(-1))


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


@every_family
def test_retention_is_the_share_of_vision_entries_kept(name: str) -> None:
    expected = truth(name, 0, "batch")
    _, _, report = run_pruned(EVERY[name].build(0), expected.inputs, expected.numbers)
    kept = sum(int((layer >= 0).sum()) for layer in kept_of(report))
    vision = int((expected.spans > 0).sum()) * KV_HEADS * len(report.layers)
    assert report.retention == pytest.approx(kept / vision)


# --- 1. Keeping all is the untouched model --------------------------------------------------------


@every_case
def test_keeping_all_is_the_untouched_model(name: str, rows: str, seed: int) -> None:
    expected = truth(name, seed, rows)
    model = EVERY[name].build(seed)
    tokens, logits, report = run_pruned(model, expected.inputs, Numbers(r=1.0, delta_r=0.0))
    assert torch.equal(tokens, expected.tokens)
    assert (logits - expected.logits).abs().max() < LOGITS
    for layer in kept_of(report):
        assert (layer >= 0).sum(-1).eq((expected.spans > 0).sum(1, keepdim=True)).all()


# --- 3. A row of a padded batch is the row alone --------------------------------------------------


@pytest.mark.parametrize(
    ("name", "seed"), [(name, seed) for name, rows, seed in CASES if rows == "batch"]
)
def test_a_row_of_a_batch_is_the_row_alone(name: str, seed: int) -> None:
    family = EVERY[name]
    expected = truth(name, seed, "batch")
    model = family.build(seed)
    tokens, logits, report = run_pruned(model, expected.inputs, expected.numbers)
    compared = 0
    for row, spec in enumerate(ROWS["batch"]):
        alone, _ = family.make_inputs(model, [spec], seed)
        its_tokens, its_logits, its_report = run_pruned(model, alone, expected.numbers)
        if differing_positions(kept_of(report), row, kept_of(its_report)):
            # only where the oracle calls it a tie; then the two rows decode different caches
            assert not oracle.compare(expected.select(), kept_of(report)).wrong
            continue
        compared += 1
        assert torch.equal(its_tokens[0], tokens[row])
        assert (its_logits[0] - logits[row]).abs().max() < LOGITS
    assert compared >= 2


def differing_positions(batch: list[Tensor], row: int, alone: list[Tensor]) -> int:
    def sets(layer: Tensor, index: int) -> list[set[int]]:
        return [set(head.tolist()) - {-1} for head in layer[index]]

    return sum(
        len(mine ^ other)
        for together, single in zip(batch, alone, strict=True)
        for mine, other in zip(sets(together, row), sets(single, 0), strict=True)
    )


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
    gc.collect()
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


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


def state_of(model: PreTrainedModel) -> dict[str, object]:
    """Everything that attaching could leave behind on a module."""
    hooks = [attribute for attribute in vars(model) if attribute.endswith("_hooks")]
    assert hooks, "this is how torch stores hooks"
    state: dict[str, object] = {}
    for name, module in model.named_modules():
        state[f"{name} attributes"] = set(vars(module))
        state[f"{name} class"] = type(module)
        state[f"{name} hooks"] = [len(getattr(module, hook) or ()) for hook in hooks]
        if hasattr(module, "config"):
            state[f"{name} config"] = id(module.config)
            state[f"{name} attention"] = module.config._attn_implementation
    return state


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
