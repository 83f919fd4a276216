"""Recall on whole models: against the oracle step by step, and in every way of generating."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import plphp
import tiny
from invariants import EVERY, LOGITS, ROWS, STEPS, generate, kept_of, state_of, truth
from plphp.cache import allocated

FAMILIES = ("qwen2_vl", "llava", "idefics2", "gemma3", "internvl")
EVERY_HOME = (plphp.Recall("host", 0.4), plphp.Recall("int4", 0.4), plphp.Recall("int2", 0.4))
SOME = plphp.PLPHP(r=0.4, delta_r=0.2, alpha=0.6, beta=0.5)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def everything_at_hand() -> plphp.Recall:
    """All the machinery, and nothing that is not read: equal to the untouched model."""
    recall = plphp.Recall("host")
    object.__setattr__(recall, "budget", 3.0)  # room for the index and for every token
    return recall


def run(
    model: Any, inputs: dict[str, Tensor], recall: plphp.Recall, **options: Any
) -> tuple[Tensor, Tensor, Any]:
    """Tokens, logits and the cache."""
    with plphp.prune(model, SOME, recall=recall):
        cache = plphp.PrunedCache(model)
        tokens, logits = generate(model, inputs, past_key_values=cache, **options)
    return tokens, logits, cache


# --- the oracle -----------------------------------------------------------------------------------


def hide(probes: list[oracle.Probe], spans: Tensor, first: int, read: list[list[Tensor]]) -> None:
    """From column `first` on, every column sees of the images what it has read."""
    for probe, layer in zip(probes, read, strict=True):
        for step, positions in enumerate(layer):
            probe.single.append((first + step, oracle.hidden_columns(spans, positions)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", ["batch", "three"])
def test_every_step_is_the_oracles_with_what_it_did_not_read_hidden(family: str, rows: str) -> None:
    expected = truth(family, 0, rows)
    model = expected.build()
    tokens, logits, cache = run(model, expected.inputs, plphp.Recall(budget=0.4, record=True))
    read = cache.recalled()
    pruned = [layer for index, layer in enumerate(read) if index not in expected.whole]
    assert {len(layer) for layer in pruned} == {STEPS - 1}
    assert any(not torch.equal(layer[0], layer[-1]) for layer in pruned), "nothing chosen anew"
    copied, probes = oracle.instrumented(model)
    hide(probes, expected.spans, expected.spans.shape[1], read)
    _, wanted = oracle.generate(copied, expected.inputs, STEPS, tokens)
    assert (logits - wanted).abs().max() < LOGITS
    assert (logits - expected.logits).abs().max() > LOGITS, "everything was read"


def rounding(spans: Tensor, kept: Tensor, bits: int) -> Callable[[Tensor, Tensor], Any]:
    """What codes make of the vision tokens that are not kept, told the slow way."""
    hidden = oracle.hidden_columns(spans, kept)

    def rough(x: Tensor, dim: int) -> Tensor:
        low = x.amin(dim, keepdim=True).half().float()
        step = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half().float()
        return ((x - low) / step).round().clamp(min=0) * step + low

    def change(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = keys.clone(), values.clone()
        for row in range(hidden.shape[0]):
            for head in range(hidden.shape[1]):
                gone = hidden[row, head].nonzero()[:, 0]
                for group in torch.split(gone, 32):
                    if len(group):
                        keys[row, head, group] = rough(keys[row, head, group], 0)
                values[row, head, gone] = rough(values[row, head, gone], 1)
        return keys, values

    return change


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recall", EVERY_HOME[1:], ids=str)
def test_codes_are_the_oracles_rounded_keys_and_values(family: str, recall: plphp.Recall) -> None:
    expected = truth(family, 0, "batch")
    model = expected.build()
    tokens, logits, cache = run(model, expected.inputs, recall)
    copied, probes = oracle.instrumented(model)
    for probe, kept in zip(probes, kept_of(cache.report), strict=True):
        probe.rounding = rounding(expected.spans, kept, recall.bits or 0)
    _, wanted = oracle.generate(copied, expected.inputs, STEPS, tokens)
    # A key that the oracle has 1e-7 elsewhere may be rounded to the next code.
    distance = (logits - wanted).abs().amax(-1)
    assert distance.median() < LOGITS and distance.max() < 50 * LOGITS
    assert (logits - expected.logits).abs().max() > 50 * LOGITS, "nothing was rounded"


# --- equal to the untouched model -----------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two answers": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 16},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def ask(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(7)
    out: Tensor = model.generate(**{**GREEDY, **inputs, **options})
    return out


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics2"])
def test_with_everything_at_hand_it_is_the_untouched_model(family: str, call: str) -> None:
    rows = "three" if call == "lookup" else "batch"
    expected = truth(family, 0, rows)
    model = expected.build()
    wanted = ask(model, expected.inputs, **CALLS[call])
    with plphp.prune(model, SOME, recall=everything_at_hand()) as pruning:
        assert torch.equal(ask(model, expected.inputs, **CALLS[call]), wanted)
        assert pruning.report.recall.steps > 0
    before = state_of(model)
    with plphp.prune(model, SOME, recall=plphp.Recall(budget=1)):
        assert torch.equal(ask(model, expected.inputs, **CALLS[call]), wanted)
    assert state_of(model) == before


@pytest.mark.parametrize("recall", EVERY_HOME, ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_every_way_of_generating(recall: plphp.Recall, call: str) -> None:
    """Greedy answers do not depend on how they were asked for."""
    family, rows = "qwen2_vl", "three" if call == "lookup" else "batch"
    model = truth(family, 0, rows).build()
    inputs = truth(family, 0, rows).inputs
    with plphp.prune(model, SOME, recall=recall) as pruning:
        plain = ask(model, inputs)
        out = ask(model, inputs, **CALLS[call])
        assert pruning.report.recall.share <= 1
    if call in ("chunks", "lookup", "greedy"):
        assert torch.equal(out, plain)


@pytest.mark.parametrize("recall", EVERY_HOME, ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "idefics2"])
def test_a_row_of_a_padded_batch_is_the_row_alone(family: str, recall: plphp.Recall) -> None:
    expected = truth(family, 0, "batch")
    model = expected.build()
    tokens, logits, _ = run(model, expected.inputs, recall)
    for row, spec in enumerate(expected.rows):
        alone, _ = EVERY[family].make_inputs(model, [spec], 0)
        its_tokens, its_logits, _ = run(model, alone, recall)
        assert torch.equal(its_tokens[0], tokens[row])
        assert (its_logits[0] - logits[row]).abs().max() < LOGITS


# --- later turns ----------------------------------------------------------------------------------


def turns(model: Any, family: str, cache: Any) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Prompt, tokens and logits of a question about two images and of one that follows."""
    spec = tiny.RowSpec(images=2, text=30)
    inputs, _ = EVERY[family].make_inputs(model, [spec], 0)
    first, logits = generate(model, inputs, 6, past_key_values=cache)
    more = torch.arange(9)[None] + tiny.SPECIAL
    ids = torch.cat([inputs["input_ids"], first, more], 1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        later["mm_token_type_ids"] = torch.nn.functional.pad(
            kinds, (0, ids.shape[1] - kinds.shape[1])
        )
    second, after = generate(model, later, 6, past_key_values=cache)
    return [(inputs, first, logits), (later, second, after)]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics2"])
def test_a_later_turn_reads_every_image_again(family: str) -> None:
    """Its prompt sees all of the conversation, its answer what it looks for in every image."""
    model = EVERY[family].build(0)
    with plphp.prune(model, SOME, recall=plphp.Recall(budget=0.4, record=True)):
        cache = plphp.PrunedCache(model)
        logs: list[Any] = []
        real = cache.open

        def opened(*args: Any) -> None:
            logs.append(cache.recalled())
            real(*args)

        cache.open = opened
        (inputs, _, _), (later, second, logits) = turns(model, family, cache)
        logs.append(cache.recalled())
    _, spans = EVERY[family].make_inputs(model, [tiny.RowSpec(images=2, text=30)], 0)
    report = cache.report
    assert report.images == (2,) and report.recall.share <= 0.4
    begin = later["input_ids"].shape[1]
    copied, probes = oracle.instrumented(model)
    hide(probes, spans, inputs["input_ids"].shape[1], logs[1])
    # the columns of the first answer were read one by one, the question at once
    hide(probes, spans, begin, logs[2])
    whole = {**inputs, **later}
    _, wanted = oracle.generate(copied, whole, 6, second)
    assert (logits - wanted).abs().max() < LOGITS
    assert len(logs[1][0]) == len(logs[2][0]) == 5


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics2"])
def test_a_conversation_with_everything_at_hand_is_the_untouched_models(family: str) -> None:
    model = EVERY[family].build(0)
    with plphp.prune(model, plphp.PLPHP(r=1, delta_r=0)):
        wanted = turns(model, family, plphp.PrunedCache(model))
    with plphp.prune(model, SOME, recall=everything_at_hand()):
        found = turns(model, family, plphp.PrunedCache(model))
    for (_, tokens, logits), (_, own, mine) in zip(wanted, found, strict=True):
        assert torch.equal(tokens, own)
        assert (logits - mine).abs().max() < LOGITS


# --- bytes, refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", EVERY_HOME, ids=str)
def test_reported_bytes_are_allocated_ones_at_every_step(recall: plphp.Recall) -> None:
    model = tiny.FAMILIES["qwen2_vl"].build(0)
    inputs, spans = EVERY["qwen2_vl"].make_inputs(model, ROWS["three"], 0)
    with plphp.prune(model, SOME, recall=recall):
        cache = plphp.PrunedCache(model, max_len=400)
        generate(model, inputs, 1, past_key_values=cache)
        report = cache.report
        assert report.kv_bytes == cache.kv_bytes()
        found = report.recall
        homes = [layer.parked for _, layer in cache.pruned_layers()]
        assert found.parked == allocated(x for home in homes for x in home.parked())
        held = allocated(x for home in homes for x in home.tensors())
        assert held == found.index + (found.parked if recall.bits else 0)
        stores = (layer.store for _, layer in cache.pruned_layers())
        assert report.kv_bytes == held + allocated(
            [cache.shift, *(x for store in stores for x in store.tensors())]
        )
        assert found.resident <= found.device <= recall.budget * found.full
        before = cache.kv_bytes()
        token = torch.full((1, 1), tiny.SPECIAL)
        for _ in range(4):
            model(input_ids=token, past_key_values=cache)
            assert cache.kv_bytes() == before
    vision = int((spans > 0).sum())
    keys = next(cache.pruned_layers())[1].store.keys
    size = 2 * keys.shape[-1] * keys.element_size()
    assert found.full == vision * size * keys.shape[1] * len(homes)


def test_what_recall_cannot_do_is_refused() -> None:
    model = tiny.FAMILIES["qwen2_vl"].build(0)
    before = state_of(model)
    with pytest.raises(plphp.UnsupportedModeError, match="FastV"):
        plphp.prune(model, plphp.policy("fastv"), recall="host")
    with pytest.raises(ValueError, match="home"):
        plphp.prune(model, recall="disk")
    with pytest.raises(ValueError, match="at least"):
        plphp.prune(model, recall=plphp.Recall("int4", 0.01))
    assert state_of(model) == before
    inputs, _ = EVERY["qwen2_vl"].make_inputs(model, ROWS["one"], 0)
    with plphp.prune(model, recall="host"):
        with pytest.raises(plphp.UnsupportedModeError, match="static"):
            plphp.PrunedCache(model, max_len=300, static=True)
        cache = plphp.PrunedCache(model)
        generate(model, inputs, 2, past_key_values=cache)
        with pytest.raises(plphp.UnsupportedModeError, match="saved"):
            cache.save("/tmp/never")


@pytest.mark.parametrize("recall", EVERY_HOME, ids=str)
def test_text_alone_parks_nothing(recall: plphp.Recall) -> None:
    model = tiny.FAMILIES["llava"].build(0)
    inputs, _ = EVERY["llava"].make_inputs(model, [tiny.NONE], 0)
    wanted, _ = generate(model, inputs, 4)
    with plphp.prune(model, SOME, recall=recall) as pruning:
        assert torch.equal(generate(model, inputs, 4)[0], wanted)
        assert pruning.report.recall is None
