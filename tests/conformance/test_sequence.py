"""Methods that remove tokens from the hidden states, against an oracle that only hides them.

In the oracle every layer from K on hides the dropped columns from all queries by its mask. For the
tokens that stay, the result is the same: they attend to the same tokens in both.
"""

from typing import Any

import pytest
import torch
from leaving import cut, dropped_columns, hidden_from, without
from torch import Tensor

import oracle
import plphp
import tiny
from invariants import EVERY, LOGITS, generate, state_of, truth

KEEP = 0.4
METHODS = {
    "fastv": lambda: plphp.policy("fastv", layer=2, keep=KEEP),
    "vtw": lambda: plphp.policy("vtw", layer=2),
    "divprune": lambda: plphp.policy("divprune", budget=KEEP),
}
# They choose by other rules, and leave in the same way.
OTHERS = {
    "dart": lambda: plphp.policy("dart", layer=2, keep=KEEP),
    "cdpruner": lambda: plphp.policy("cdpruner", budget=KEEP),
    "vidcom2": lambda: plphp.policy("vidcom2", budget=KEEP),
}
FIRST = {
    "fastv": 2,
    "vtw": 2,
    "dart": 2,
    "divprune": 0,
    "cdpruner": 0,
    "vidcom2": 0,
}  # the first layer that drops tokens
REFUSED = {  # why no token may leave the hidden states of these families
    ("gemma3", "fastv"): "layer 1 cannot score the tokens",
}


def best(scores: Tensor, spans: Tensor, keep: float) -> tuple[list[int], float]:
    """One row's columns with the highest scores, and by how much the last one is ahead."""
    vision = (spans > 0).nonzero()[:, 0]
    count = min(len(vision), int(-(-(keep * len(vision) - 1e-6) // 1)))
    order = scores[vision].sort(descending=True, stable=True)
    margin = float(order.values[count - 1] - order.values[count]) if count < len(vision) else 1.0
    return sorted(vision[order.indices[:count]].tolist()), margin


@pytest.mark.parametrize("rows", ["one", "batch"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_leaving_equals_hiding(family: str, name: str, rows: str) -> None:
    check_leaving(family, name, rows)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("family", "rows"),
    [
        ("llava", "batch"),
        ("qwen3_vl", "videos"),
        ("llava_onevision", "videos"),
        ("smolvlm", "videos"),
    ],
)
def test_other_methods_leave_in_the_same_way(family: str, name: str, rows: str) -> None:
    check_leaving(family, name, rows)


def check_leaving(family: str, name: str, rows: str) -> None:
    make = {**METHODS, **OTHERS}[name]
    expected = truth(family, 0, rows)
    model = expected.build()
    if (family, name) in REFUSED:
        before = state_of(model)
        errors, why = (plphp.UnsupportedModelError, plphp.UnsupportedModeError), (family, name)
        with pytest.raises(errors, match=REFUSED[why]), plphp.prune(model, make()):
            generate(model, expected.inputs)
        assert state_of(model) == before
        return
    first = FIRST[name]
    with plphp.prune(model, make(), vision_mask=expected.mask) as pruning:
        tokens, logits = generate(model, expected.inputs)
        report = pruning.report
    attending = [layer for layer in report.layers[first:] if layer.kept.shape[1]]
    for layer in report.layers[:first]:
        assert layer.retention == 1
    assert len({layer.retention for layer in attending}) == 1
    kept = attending[0].kept
    if name == "fastv":
        check_ranking(expected, kept)
    dropped = dropped_columns(expected.spans, kept)
    if family == "qwen3_5" and not first:  # a mask cannot hide a column from a recurrent layer
        wanted, wanted_logits = without(model, expected.inputs, dropped, tokens)
    else:
        model.set_attn_implementation("eager")
        with hidden_from(model, first, dropped):
            wanted, wanted_logits = oracle.generate(model, expected.inputs, len(tokens[0]), tokens)
    assert torch.equal(tokens, wanted)
    assert (logits - wanted_logits).abs().max() < LOGITS
    if any(row.images for row in expected.rows):
        assert (logits - expected.logits).abs().max() > LOGITS, "nothing left"


def check_ranking(expected: Any, kept: Tensor) -> None:
    """The kept tokens are those to which the last token attends most in layer 1, except ties."""
    scores = expected.probabilities[1].mean(1)
    for row, spans in enumerate(expected.spans):
        if not bool((spans > 0).any()):
            continue
        wanted, margin = best(scores[row], spans, KEEP)
        logical = ((spans >= 0).cumsum(-1) - 1)[wanted].tolist()
        got = [position for position in kept[row, 0].tolist() if position >= 0]
        assert got == logical or margin < 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_unequal_length_and_no_padding(name: str) -> None:
    """Rows of one length may keep different counts: fillers are hidden without a given mask."""
    model = EVERY["llava"].build(0)
    specs = [tiny.RowSpec(images=1, text=40), tiny.RowSpec(images=2, text=40)]
    alone = [EVERY["llava"].make_inputs(model, [spec], 0)[0] for spec in specs]
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    specs[0] = tiny.RowSpec(images=1, text=40 + lengths[1] - lengths[0])
    inputs, spans = EVERY["llava"].make_inputs(model, specs, 0)
    assert bool((spans >= 0).all())
    del inputs["attention_mask"]
    with plphp.prune(model, METHODS[name]()):
        together, _ = generate(model, inputs)
        for row, spec in enumerate(specs):
            one, _ = EVERY["llava"].make_inputs(model, [spec], 0)
            assert torch.equal(generate(model, one)[0][0], together[row])


@pytest.mark.parametrize("name", ["fastv", "divprune"])
def test_a_row_that_keeps_every_column(name: str) -> None:
    """The longest row is text, so that the batch keeps its number of columns."""
    family = EVERY["llava"]
    model = family.build(0)
    specs = [tiny.RowSpec(images=0, text=150), tiny.RowSpec(images=1, text=40)]
    inputs, _ = family.make_inputs(model, specs, 0)
    assert inputs["input_ids"].shape[1] == 150
    with plphp.prune(model, METHODS[name]()):
        together, _ = generate(model, inputs)
        for row in (0, 1):
            columns = inputs["attention_mask"][row] > 0
            one = {k: v[row : row + 1, columns] for k, v in inputs.items() if v.dim() == 2}
            pixels = {"pixel_values": inputs["pixel_values"]} if row else {}
            assert torch.equal(generate(model, {**one, **pixels})[0][0], together[row])


def test_a_budget_out_of_reach_is_said_when_attaching() -> None:
    model = EVERY["llava"].build(0)
    with pytest.raises(ValueError, match="budget must be at least layer / layers = 2 / 4"):
        plphp.prune(model, plphp.policy("fastv", budget=0.2))
    with plphp.prune(model, plphp.policy("fastv", budget=0.2 + 0.1, layer=1)):
        pass


def test_a_text_only_prompt_and_a_second_turn_pass_through() -> None:
    expected = truth("llava", 0, "one")
    model = expected.build()
    inputs, _ = EVERY["llava"].make_inputs(model, [tiny.NONE], seed=0)
    untouched = generate(model, inputs)[0]
    with plphp.prune(model, METHODS["fastv"]()) as pruning:
        assert torch.equal(generate(model, inputs)[0], untouched)
        assert pruning.report.retention == 1
        cache = plphp.PrunedCache(model)
        first = model.generate(**expected.inputs, cache=cache, max_new_tokens=4, do_sample=False)
        held = cache.kv_bytes()
        second = torch.cat([first, inputs["input_ids"][:, :5]], -1)
        out = model.generate(second, cache=cache, max_new_tokens=4, do_sample=False)
    assert out.shape[1] == second.shape[1] + 4
    assert cache.kv_bytes() >= held


@pytest.mark.parametrize("name", ["divprune", "vtw", "fastv", "dart"])
def test_the_last_token_of_a_prompt_always_stays(name: str) -> None:
    """The answer is predicted from it, also where it is a vision token or no text is there."""
    expected = truth("llava", 0, "one")
    model = expected.build()
    columns = expected.inputs["input_ids"].shape[1]
    make = {**METHODS, **OTHERS}[name] if name != "divprune" else None
    policy = make() if make else plphp.policy("divprune", budget=0, min_tokens=0)
    spans = torch.ones(1, columns, dtype=torch.long)
    with plphp.prune(model, policy, vision_mask=spans) as pruning:
        tokens, logits = generate(model, expected.inputs)
        kept = pruning.report.layers[-1].kept
    assert kept[0, 0, -1] == columns - 1
    model.set_attn_implementation("eager")
    with hidden_from(model, FIRST[name], dropped_columns(spans, kept)):
        wanted = oracle.generate(model, expected.inputs, len(tokens[0]), tokens)[1]
    assert (logits - wanted).abs().max() < LOGITS


@pytest.mark.parametrize(
    ("name", "options"),
    [("vtw", {}), *((n, o) for n in ("fastv", "dart") for o in ({}, {"prefill_chunk_size": 16}))],
)
def test_tokens_leave_before_recurrent_layers(name: str, options: dict[str, Any]) -> None:
    """With VTW a chunk of vision tokens alone would be a filler in a recurrent layer: refused."""
    family = EVERY["qwen3_5"]
    config = family.config()
    config.text_config.layer_types = ["full_attention", "linear_attention"] * 2
    model = family.build(0, config)
    inputs, spans = family.make_inputs(model, [tiny.ONE], 0)
    with plphp.prune(model, plphp.policy(name, layer=1)) as pruning:
        tokens, logits = generate(model, inputs, **options)
        kept = pruning.report.stages[0].stays[:, None]
    dropped = dropped_columns(spans, kept)
    assert int(dropped.sum()) >= int((spans > 0).sum()) // 2
    assert (logits - cut(model, inputs, 1, dropped, tokens)).abs().max() < LOGITS


@pytest.mark.parametrize("name", ["fastv", "dart"])
def test_a_recurrent_layer_cannot_be_chosen_by(name: str) -> None:
    model = EVERY["qwen3_5"].build(0)
    with pytest.raises(plphp.UnsupportedModelError, match="chooses by layer 0 of this decoder"):
        plphp.prune(model, plphp.policy(name, layer=1))
