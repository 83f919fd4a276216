"""The oracle has to be right before anything is judged against it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import tiny
from oracle import Numbers

EVERY = {
    name: family
    for name, family in {**tiny.FAMILIES, **tiny.VARIANTS}.items()
    if family.available and not family.keyless
}
STEPS = 16


def rows_of(name: str) -> tuple[tiny.RowSpec, ...]:
    return tiny.CROSSING if name == "idefics2_window" else tiny.ROWS["batch"]


def untouched(model: torch.nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """As a user calls it: the model's own attention and its own cache."""
    out = model.generate(
        **inputs,
        max_new_tokens=STEPS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1)


# --- tiny models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_prompts_are_what_they_say(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    inputs, spans = family.make_inputs(model, tiny.ROWS["batch"], seed=0)
    assert torch.equal(inputs["input_ids"] == tiny.IMAGE, spans > 0)
    assert torch.equal(inputs["attention_mask"] == 0, spans == -1)
    assert spans.amax(1).tolist() == [0, 1, 3]
    assert (spans[:, -1] == 0).all(), "the last token is text"
    text = (spans == 0) & (inputs["input_ids"] >= tiny.SPECIAL)
    assert text.sum(1).tolist() == [spec.text for spec in tiny.ROWS["batch"]]
    assert 60 <= spans.shape[1] <= 400


@pytest.mark.parametrize("name", EVERY)
def test_touching_images_have_no_text_between(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    spec = tiny.RowSpec(images=3, text=30, touching=True)
    inputs, spans = family.make_inputs(model, [spec], seed=0)
    first, last = (spans[0] > 0).nonzero()[[0, -1], 0]
    assert (inputs["input_ids"][0, first:last] < tiny.SPECIAL).all()
    untouched(model, inputs)  # the model takes as many features as there are placeholders


@pytest.mark.parametrize("name", EVERY)
def test_a_row_is_the_same_alone_and_in_a_batch(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    inputs, spans = family.make_inputs(model, tiny.ROWS["batch"], seed=0)
    tokens, logits = untouched(model, inputs)
    for row, spec in enumerate(tiny.ROWS["batch"]):
        alone, own = family.make_inputs(model, [spec], seed=0)
        start = oracle.padding(spans[row])
        assert torch.equal(alone["input_ids"][0], inputs["input_ids"][row, start:])
        assert torch.equal(own[0], spans[row, start:])
        its_tokens, its_logits = untouched(model, alone)
        assert torch.equal(its_tokens[0], tokens[row])
        assert (its_logits[0] - logits[row]).abs().max() < 1e-4


def test_idefics2_slides_by_default() -> None:
    model = tiny.FAMILIES["idefics2"].build(0)
    assert model.get_decoder().config.sliding_window == 4096


# --- prefill and decode ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_prefill_is_the_models_own_attention(name: str) -> None:
    family = EVERY[name]
    model = family.build(1)
    inputs, spans = family.make_inputs(model, rows_of(name), seed=1)
    layers = oracle.prefill(model, inputs)
    model.set_attn_implementation("eager")
    out = model.generate(
        **inputs, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True
    )
    for mine, own in zip(layers, out.attentions[0], strict=True):
        assert mine.shape == own[:, :, -1].shape
        assert (mine - own[:, :, -1]).abs().max() < 1e-5
        assert (mine.transpose(1, 2)[spans < 0] == 0).all()
        assert (mine.sum(-1) - 1).abs().max() < 1e-12


def decode(
    model: Any, inputs: dict[str, Tensor], spans: Tensor, kept: list[Tensor], *tokens: Tensor
) -> tuple[Tensor, Tensor]:
    dropped = oracle.Dropped(spans.shape[1], spans, kept)
    return oracle.decode(model, inputs, [dropped], STEPS, *tokens)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("seed", range(2))
def test_keeping_all_is_the_untouched_model(name: str, seed: int) -> None:
    family = EVERY[name]
    model = family.build(seed)
    inputs, spans = family.make_inputs(model, rows_of(name), seed)
    tokens, logits = untouched(model, inputs)
    keep_all = oracle.select(oracle.prefill(model, inputs), spans, Numbers(r=1, delta_r=0), 2)
    mine, my_logits = decode(model, inputs, spans, keep_all.tensors())
    assert torch.equal(mine, tokens)
    assert (my_logits - logits).abs().max() < 1e-5
    again, logits_again = untouched(model, inputs)
    assert torch.equal(again, tokens), "the model is intact"
    assert torch.equal(logits_again, logits)


@pytest.mark.parametrize("name", EVERY)
def test_hiding_one_token_in_one_head_changes_only_its_row(name: str) -> None:
    family = EVERY[name]
    model = family.build(0)
    rows = (tiny.ONE, tiny.THREE)
    inputs, spans = family.make_inputs(model, rows, seed=0)
    probabilities = oracle.prefill(model, inputs)
    kept = oracle.select(probabilities, spans, Numbers(r=1, delta_r=0), 2).tensors()
    tokens, logits = decode(model, inputs, spans, kept)
    score = probabilities[2][1, 4:].mean(0).masked_fill(spans[1] <= 0, 0.0)
    dropped = int(score.argmax()) - oracle.padding(spans[1])
    kept[2][1, 1][kept[2][1, 1] == dropped] = -1
    _, hidden = decode(model, inputs, spans, kept, tokens)
    change = (hidden - logits).abs().amax(-1)
    assert (change[0] < 1e-5).all()
    assert change[1, 0] < 1e-5, "the prompt's own forward pass sees everything"
    assert (change[1, 1:] > 1e-4).any()


def test_dropped_tokens_do_not_act_through_their_values() -> None:
    """The mask is exact: what a dropped token's cache holds is of no consequence in its head."""
    module = torch.nn.Module()
    kept = torch.tensor([[[2, -1], [1, 2]]])
    hidden = oracle.hidden_columns(torch.tensor([[-1, 0, 1, 1, 0]]), kept)
    assert hidden.tolist() == [[[False, False, True, False, False], [False] * 5]]
    query, key, value = (torch.randn(1, heads, 5, 4) for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 1, 5)
    results = []
    for poison in (0.0, 1e6):
        value[0, 0, 2] = poison
        module.oracle_probe = oracle.Probe(torch.ones(1), hidden=[(0, math.inf, hidden)])
        results.append(oracle.attend(module, query[:, :, -1:], key, value, mask)[0])
    assert torch.equal(results[0], results[1])


def test_forced_tokens_are_taken() -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    inputs, _ = family.make_inputs(model, tiny.ROWS["batch"], seed=0)
    tokens = torch.randint(tiny.SPECIAL, tiny.VOCAB, (3, STEPS))
    copied, _ = oracle.instrumented(model)
    taken, logits = oracle.generate(copied, inputs, STEPS, tokens)
    assert torch.equal(taken, tokens)
    assert logits.isfinite().all(), "raw logits, not what forcing made of them"


# --- selection, on examples worked by hand --------------------------------------------------------


def choose(scores: list[float], spans: list[int], **numbers: object) -> list[int]:
    """What one KV head keeps. One query head, and its probabilities need not sum to one."""
    row = oracle.choose(torch.tensor([scores], dtype=torch.float64), spans, Numbers(**numbers), 1)
    return sorted(row.kept[0])


FLAT = {"alpha": 0.0, "beta": 0.0, "delta_r": 0.0}  # every layer keeps r


@pytest.mark.parametrize(
    ("rate", "size", "count"),
    [
        (0.4, 5, 2),  # exactly 2
        (0.4, 6, 3),  # 2.4
        (0.4 + 0.3, 10, 7),  # 7 however 0.7 * 10 is rounded
        (0.4 - 0.3, 20, 2),  # 0.10000000000000003 * 20 is 2.0000000000000004
        (0.1, 3, 1),
        (0.0, 7, 0),
        (1.0, 7, 7),
    ],
)
def test_ceil_rule(rate: float, size: int, count: int) -> None:
    assert oracle.budget(rate, size) == count
    kept = choose([1.0 / (j + 1) for j in range(size)], [1] * size, r=rate, **FLAT)
    assert kept == list(range(count))


def test_ties_go_to_the_lower_position() -> None:
    assert choose([0.1, 0.2, 0.1, 0.2, 0.1, 0.1], [1] * 6, r=0.5, **FLAT) == [0, 1, 3]
    assert choose([0.1] * 6, [0, 1, 1, 1, 1, 0], r=0.5, **FLAT) == [1, 2]


def test_each_image_has_its_own_budget_unless_global() -> None:
    scores = [0.3, 0.2, 0.1, 0.05, 0.9, 0.04, 0.03, 0.02, 0.01, 0.0]
    spans = [1, 1, 1, 1, 0, 2, 2, 2, 2, 0]
    assert choose(scores, spans, r=0.5, **FLAT) == [0, 1, 5, 6]
    assert choose(scores, spans, r=0.5, budget="global", **FLAT) == [0, 1, 2, 3]


def test_an_images_tiles_share_a_budget() -> None:
    scores, spans = [0.3, 0.2, 0.9, 0.1, 0.05], [1, 1, 0, 1, 1]
    assert choose(scores, spans, r=0.5, **FLAT) == [0, 1]


def test_min_tokens_is_a_floor_for_every_image() -> None:
    scores, spans = [0.3, 0.2, 0.1, 0.04, 0.03, 0.02, 0.5], [1, 1, 1, 2, 2, 2, 0]
    assert choose(scores, spans, r=0.1, min_tokens=2, **FLAT) == [0, 1, 3, 4]
    assert choose(scores, spans, r=0.1, min_tokens=9, **FLAT) == [0, 1, 2, 3, 4, 5]
    assert choose(scores, spans, r=0.5, min_tokens=1, budget="global", **FLAT) == [0, 1, 3]
    assert choose(scores, spans, r=0.1, min_tokens=2, budget="global", **FLAT) == [0, 1, 3, 4]


def test_round_to_adds_the_best_dropped_tokens() -> None:
    scores, spans = [0.3, 0.2, 0.1, 0.04, 0.05, 0.02, 0.5], [1, 1, 1, 2, 2, 2, 0]
    assert choose(scores, spans, r=0.3, **FLAT) == [0, 4]
    assert choose(scores, spans, r=0.3, round_to=3, **FLAT) == [0, 1, 4], "3 of 6 dropped"
    assert choose(scores, spans, r=0.3, round_to=4, **FLAT) == [0, 4]
    assert choose(scores, spans, r=0.3, round_to=2, min_tokens=2, **FLAT) == [0, 1, 3, 4]
    assert choose(scores, spans, r=0.3, round_to=64, **FLAT) == [0, 1, 2, 3, 4, 5]


def test_scores_are_pooled_over_the_query_heads_of_a_kv_head() -> None:
    p = torch.tensor(
        [
            [0.50, 0.00, 0.30, 0.20],  # KV head 0: means 0.25 0.32 0.3, maxima 0.5 0.64 0.3
            [0.00, 0.64, 0.30, 0.06],
            [0.10, 0.10, 0.10, 0.70],  # KV head 1: means 0.1 0.1 0.15, maxima 0.1 0.1 0.2
            [0.10, 0.10, 0.20, 0.60],
        ]
    )
    spans = [1, 1, 1, 0]
    mean = oracle.choose(p, spans, Numbers(r=0.3, **FLAT), 2)
    assert mean.kept == ({1}, {2})
    assert not any(mean.near)
    top = oracle.choose(p, spans, Numbers(r=0.6, gqa="max", **FLAT), 2)
    assert top.kept == ({0, 1}, {0, 2})
    assert mean.gamma == pytest.approx((0.8 + 0.94 + 0.3 + 0.4) / 4)


@pytest.mark.parametrize(
    ("gamma", "layer_class", "rate"),
    [
        (0.75, "attentive", 0.7),
        (0.5, "attentive", 0.7),  # alpha itself
        (0.375, "balanced", 0.4),
        (0.25, "balanced", 0.4),  # beta itself
        (0.125, "indifferent", 0.1),
    ],
)
def test_layer_classes(gamma: float, layer_class: str, rate: float) -> None:
    numbers = Numbers(alpha=0.5, beta=0.25)
    row = oracle.choose(torch.tensor([[gamma, 1 - gamma]]), [1, 0], numbers, 1)
    assert (row.gamma, row.layer_class) == (gamma, layer_class)
    assert row.rate == pytest.approx(rate)
    assert row.near_threshold == (gamma in (0.5, 0.25))


def test_padding_of_rows_is_not_counted() -> None:
    spans = torch.tensor([[-1, -1, 1, 1, 0], [0, 1, 1, 2, 0], [-1, -1, -1, 0, 0]])
    p = torch.tensor([[0.0, 0.0, 0.1, 0.4, 0.5], [0.1, 0.2, 0.3, 0.3, 0.1], [0, 0, 0, 0.5, 0.5]])
    selection = oracle.select([p.unsqueeze(1)], spans, Numbers(r=0.5, **FLAT), 1)
    assert [row.kept[0] for row in selection.choices[0]] == [{1}, {2, 3}, set()]
    assert selection.vision == ({0, 1}, {1, 2, 3}, set())
    text_only = selection.choices[0][2]
    assert math.isnan(text_only.gamma)
    assert text_only.rate is None
    (kept,) = selection.tensors()
    assert kept.tolist() == [[[1, -1]], [[2, 3]], [[-1, -1]]]
    hidden = oracle.hidden_columns(spans, kept)
    assert hidden.nonzero().tolist() == [[0, 0, 2], [1, 0, 1]]


def test_only_what_is_near_a_boundary_is_exempt() -> None:
    spans = torch.tensor([[1, 1, 1, 1, 0]])
    p = torch.tensor([[[0.4, 0.300004, 0.299996, 0.1, 0.0]]], dtype=torch.float64)
    numbers = Numbers(r=0.5, **FLAT)
    selection = oracle.select([p], spans, numbers, 1)
    assert selection.choices[0][0].near == ({1, 2},)

    def judge(*kept: int) -> oracle.Verdict:
        return oracle.compare(selection, [torch.tensor([[kept]])])

    assert judge(0, 1).wrong == judge(2, 0, -1).wrong == []
    assert judge(0, 1).share == 0.5
    for kept in ((0, 3), (1, 2), (0, 1, 2), (0,), (0, 0), (0, 4)):
        assert len(judge(*kept).wrong) == 1, kept
