"""Recall on whole models: its bytes, and with everything resident the untouched model's answers.

tests/conformance/test_matrix.py compares it with the oracle at each step, in every mode.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import plphp
import tiny
from invariants import EVERY, LOGITS, ROWS, generate, state_of, truth
from plphp.cache import allocated
from plphp.errors import UnsupportedModeError
from plphp.recall import HOMES

FAMILIES = ("qwen2_vl", "llava", "idefics2", "gemma3", "internvl")
EVERY_HOME = (plphp.Recall("host", 0.4), plphp.Recall("int4", 0.4), plphp.Recall("int2", 0.4))
SOME = plphp.PLPHP(r=0.4, delta_r=0.2, alpha=0.6, beta=0.5)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def everything_at_hand() -> plphp.Recall:
    """Recall that reads every token, so that it equals the untouched model."""
    recall = plphp.Recall("host")
    object.__setattr__(recall, "budget", 3.0)  # a budget for the index and every token
    return recall


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
def test_recall_that_reads_every_token_equals_the_unpruned_model(family: str, call: str) -> None:
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


# --- later turns ----------------------------------------------------------------------------------


def turns(model: Any, family: str, cache: Any) -> list[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Prompt, tokens and logits of a question about two images and of one that follows."""
    spec = tiny.RowSpec(images=2, text=30)
    inputs, _ = EVERY[family].make_inputs(model, [spec], 0)
    first, logits = generate(model, inputs, 6, cache=cache)
    more = torch.arange(9)[None] + tiny.SPECIAL
    ids = torch.cat([inputs["input_ids"], first, more], 1)
    later = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        later["mm_token_type_ids"] = torch.nn.functional.pad(
            kinds, (0, ids.shape[1] - kinds.shape[1])
        )
    second, after = generate(model, later, 6, cache=cache)
    return [(inputs, first, logits), (later, second, after)]


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "idefics2"])
def test_a_conversation_in_which_every_token_is_read_equals_the_unpruned_one(family: str) -> None:
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
        generate(model, inputs, 1, cache=cache)
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
            model(input_ids=token, cache=cache)
            assert cache.kv_bytes() == before
    vision = int((spans > 0).sum())
    keys = next(cache.pruned_layers())[1].store.keys
    size = 2 * keys.shape[-1] * keys.element_size()
    assert found.full == vision * size * keys.shape[1] * len(homes)


def test_what_recall_cannot_do_is_refused() -> None:
    model = tiny.FAMILIES["qwen2_vl"].build(0)
    before = state_of(model)
    with pytest.raises(UnsupportedModeError, match="FastV"):
        plphp.prune(model, plphp.policy("fastv"), recall="host")
    with pytest.raises(ValueError, match=r"recall must be one of \('host', 'int4', 'int2'\) or"):
        plphp.prune(model, recall="disk")
    with pytest.raises(ValueError, match="at least"):
        plphp.prune(model, recall=plphp.Recall("int4", 0.01))
    assert state_of(model) == before
    with plphp.prune(model, recall="host"), pytest.raises(UnsupportedModeError, match="static"):
        plphp.PrunedCache(model, max_len=300, static=True)


@pytest.mark.parametrize("budget", [0.0, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("home", ["int4", "int2"])
def test_codes_work_with_every_budget(home: str, budget: float) -> None:
    """With a large budget all tokens of the first layers are resident, and none are in codes."""
    model = tiny.FAMILIES["llava"].build(0)
    inputs, _ = EVERY["llava"].make_inputs(model, ROWS["batch"], 0)
    with plphp.prune(model, SOME, recall=plphp.Recall(home, budget)):
        cache = plphp.PrunedCache(model)
        tokens, _ = generate(model, inputs, 4, cache=cache)
        first = next(cache.pruned_layers())[1].parked
        assert (first.keys.tokens == 0) == (budget >= 0.9)
        ids = torch.cat([inputs["input_ids"], tokens], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        generate(model, {"input_ids": ids, "attention_mask": mask}, 4, cache=cache)


# --- a home of another kind -----------------------------------------------------------------------


class Attic(HOMES["host"]):  # type: ignore[misc]
    """A new kind of home: main memory under another name, with one option less."""

    where = "in the attic"
    options = frozenset(("record",))


def test_a_new_home_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(HOMES, "attic", Attic)
    with pytest.raises(ValueError, match=r"every has no effect with home='attic'"):
        plphp.Recall("attic", every=2)
    model = tiny.FAMILIES["qwen2_vl"].build(0)
    inputs, _ = EVERY["qwen2_vl"].make_inputs(model, ROWS["one"], 0)
    answers = []
    for home in ("host", "attic"):
        with plphp.prune(model, SOME, recall=plphp.Recall(home, record=True)) as pruning:
            cache = plphp.PrunedCache(model)
            answers.append(generate(model, inputs, 6, cache=cache)[0])
            cache.save(tmp_path / home)
            plphp.PrunedCache.load(model, tmp_path / home)
    assert torch.equal(*answers)
    assert isinstance(next(cache.pruned_layers())[1].parked, Attic)
    assert "parked in the attic" in str(pruning.report)
    with (
        plphp.prune(model, SOME, recall="attic"),
        pytest.raises(plphp.InputError, match="in the same way"),
    ):
        plphp.PrunedCache.load(model, tmp_path / "host")


@pytest.mark.parametrize(
    "policy",
    [plphp.PLPHP(min_tokens=3), plphp.PLPHP(round_to=4), plphp.PLPHP(budget="global"),
     [plphp.policy("divprune"), plphp.policy("plphp-shared", min_tokens=3)]],
)  # fmt: skip
def test_options_that_recall_would_ignore_are_refused(policy: Any) -> None:
    model = EVERY["llava"].build(0)
    with pytest.raises(UnsupportedModeError, match="would have no effect, because recall decides"):
        plphp.prune(model, policy, recall="int4")
    assert "generate" not in vars(model), "nothing was changed"


def test_rates_that_recall_ignores_are_a_note() -> None:
    family = EVERY["llava"]
    model = family.build(0)
    inputs = family.make_inputs(model, [tiny.RowSpec(images=1, text=20)], 0)[0]
    for policy, names in ((plphp.policy("recommended", budget=0.2), "budget"), (plphp.PLPHP(), "")):
        with plphp.prune(model, policy, recall="host") as pruning:
            model.generate(**inputs, max_new_tokens=2)
        notes = " ".join(pruning.report.notes)
        assert ("had no effect" in notes) == bool(names) and names in notes
