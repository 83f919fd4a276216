"""A sequence method before a cache method, against an oracle that hides what either has dropped.

What the first stage drops is hidden from every column, in the prompt too; what the cache method
drops is hidden from the answer on.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from conversations import IMAGE_TURN, TEXT_TURN, inputs_of, start
from methods import HOMES
from torch import Tensor

import oracle
import plphp
import tiny
from along import check_greedy, check_logits, dropped, kept_of
from invariants import EVERY, KV_HEADS, LOGITS, generate, plphp_policy, truth

SHARE = 0.5
FIRST = {
    "divprune": (0, lambda: plphp.policy("divprune", budget=SHARE)),
    "fastv": (2, lambda: plphp.policy("fastv", layer=2, keep=SHARE)),
}
# It reads the keys of layer 1, which the cache method has pruned before layer 2.
LATE = {**FIRST, "dart": (2, lambda: plphp.policy("dart", layer=2, keep=SHARE))}
# A mask cannot hide a column from a recurrent layer; test_sequence has another reference for it.
FAMILIES = [name for name in tiny.FAMILIES if name != "qwen3_5"]
SOME = ("qwen2_vl", "qwen3_vl", "llava", "gemma3")


def left_out(report: Any, spans: Tensor, at: int) -> oracle.Dropped:
    """What the first stage dropped, hidden from all columns in the layers from `at` on."""
    stays = report.stages[0].stays[:, None].expand(-1, KV_HEADS, -1)
    every = torch.where(spans > 0, (spans >= 0).cumsum(-1) - 1, -1)[:, None]
    every = every.expand(-1, KV_HEADS, -1)
    kept = [stays if layer.layer >= at else every for layer in report.layers]
    return oracle.Dropped(0, spans, kept)


def entered(report: Any, spans: Tensor, at: int) -> list[Tensor]:
    """The spans that each layer's cache method chose from: what had left counts as text."""
    logical = (spans >= 0).cumsum(-1) - 1
    stays = (logical[..., None] == report.stages[0].stays[:, None]).any(-1)
    rest = torch.where((spans > 0) & ~stays, 0, spans)
    return [rest if layer.layer >= at else spans for layer in report.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_two_stages_equal_the_oracle(family: str) -> None:
    """Selection, logits and tokens, with PLPHP after DivPrune."""
    expected = truth(family, 0, "batch")
    model = expected.build()
    at, make = FIRST["divprune"]
    policy = [make(), plphp_policy(expected.numbers)]
    with plphp.prune(model, policy, vision_mask=expected.mask) as pruning:
        tokens, logits = generate(model, expected.inputs)
    check(expected, model, pruning.report, tokens, logits, at, choice=True)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_method_for_videos_is_followed(family: str) -> None:
    """VidCom2 keeps tokens of every frame, and PLPHP chooses from these."""
    expected = truth(family, 0, "videos")
    model = expected.build()
    first = plphp.policy("vidcom2", budget=0.4, min_tokens=2)
    with plphp.prune(model, [first, plphp_policy(expected.numbers)]) as pruning:
        tokens, logits = generate(model, expected.inputs)
    report = pruning.report
    check(expected, model, report, tokens, logits, 0, choice=True)
    assert report.stages[0].kept == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
@pytest.mark.parametrize("second", ["pyramidkv", "vl-cache", "novelty", "snapkv"])
@pytest.mark.parametrize("first", LATE)
def test_any_cache_method_follows(family: str, second: str, first: str) -> None:
    """Also methods that share a budget between layers, and after tokens that leave at layer 2."""
    if (family, first) == ("qwen3_vl", "divprune") and second != "novelty":
        pytest.skip("the same path as in llava")
    if first == "dart" and (family, second) != ("llava", "snapkv"):
        pytest.skip("the same path as FastV")
    expected = truth(family, 0, "batch")
    model = expected.build()
    at, make = LATE[first]
    with plphp.prune(model, [make(), plphp.policy(second)]) as pruning:
        tokens, logits = generate(model, expected.inputs)
    report = pruning.report
    check(expected, model, report, tokens, logits, at)
    assert report.stages[0].kept == pytest.approx(SHARE, abs=0.02)
    if at == 0:  # else layers with unequal numbers of tokens share the budget
        assert report.stages[1].kept == pytest.approx(0.4, abs=0.05)
        assert report.retention == pytest.approx(SHARE * report.stages[1].kept, rel=0.03)


def check(
    expected: Any, model: Any, report: Any, tokens: Tensor, logits: Tensor, at: int,
    choice: bool = False,
) -> None:  # fmt: skip
    """Logits and tokens along the answer, and with `choice` the selection of PLPHP."""
    first = left_out(report, expected.spans, at)
    assert 0 < report.stages[0].kept < 0.8 and 0 < report.stages[1].kept < 1
    if choice:
        probabilities = oracle.prefill(model, expected.inputs, [first])
        whole, keyless = expected.whole, EVERY[expected.name].keyless
        spans = entered(report, expected.spans, at)
        per_layer = [
            oracle.select(probabilities, own, expected.numbers, KV_HEADS, whole, keyless)
            for own in spans
        ]
        choices = tuple(one.choices[i] for i, one in enumerate(per_layer))
        assert not oracle.compare(replace(per_layer[-1], choices=choices), kept_of(report)).wrong
    hidden = [first, dropped(report, expected.spans)]
    wanted = oracle.decode(model, expected.inputs, hidden, tokens.shape[1], tokens)[1]
    check_logits(logits, wanted, report)
    check_greedy(tokens, wanted, report)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_recall_parks_what_the_first_stage_left(family: str, home: str) -> None:
    expected = truth(family, 0, "batch")
    model = expected.build()
    policy = [FIRST["divprune"][1](), plphp.policy("novelty")]
    with plphp.prune(model, policy, recall=HOMES[home]) as pruning:
        tokens, logits = generate(model, expected.inputs)
    report = pruning.report
    first = left_out(report, expected.spans, 0)
    hidden = [first, dropped(report, expected.spans)]
    if home != "host":  # what is parked are the tokens that stay, not all others
        parked = hidden[1]
        hidden[1] = replace(parked, spans=entered(report, expected.spans, 0)[0])
    wanted = oracle.decode(model, expected.inputs, hidden, tokens.shape[1], tokens)[1]
    check_logits(logits, wanted, report)
    assert "nothing was dropped by the cache" in report.summary
    assert "no layer holds keys" in "\n".join(report.remarks)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("turns", ["text", "image"])
@pytest.mark.parametrize("first", FIRST)
def test_later_turns_with_recall(first: str, turns: str, home: str) -> None:
    """A later turn reads again what entered in earlier ones, and nothing else of them."""
    if (first, home) == ("fastv", "int4"):
        pytest.skip("the oracle's codes are those of one set of tokens for all layers")
    talk = start(
        "qwen3_vl" if turns == "image" else "llava", {"text": TEXT_TURN, "image": IMAGE_TURN}[turns]
    )
    at, make = FIRST[first]
    with plphp.prune(talk.model, [make(), plphp.policy("novelty")], recall=HOMES[home]):
        talk.hold(plphp.PrunedCache(talk.model))
    gone: list[oracle.Dropped] = []
    earlier: list[oracle.Dropped] = []
    for turn, report in enumerate(talk.reports):
        every = torch.tensor([talk.prompts[turn].spans])
        before = max(talk.prompts[turn - 1].spans) if turn else 0
        if report.stages:
            gone.append(left_out(report, (every - before).clamp(min=0), at))
        tokens = torch.tensor([talk.answers[turn]])
        now = dropped(report, every)
        if home != "host":  # what is parked are the tokens that entered, not all others
            left = every.clone()
            for one in gone:
                lost = oracle.hidden_columns(one.spans, one.kept[-1])[:, 0]
                left[:, : lost.shape[1]].masked_fill_(lost, 0)
            now = replace(now, spans=left)
        wanted = oracle.decode(
            talk.model, inputs_of(talk.family, talk.prompts[turn]), [*gone, *earlier, now],
            tokens.shape[1], tokens,
        )[1]  # fmt: skip
        check_logits(talk.logits[turn], wanted, report, again=turn > 0)
        earlier.append(now)
    images = talk.reports[1].earlier
    share = sum(one.kept * one.tokens for one in images) / sum(one.tokens for one in images)
    assert share == pytest.approx(SHARE if at == 0 else (2 + 2 * SHARE) / 4, abs=0.03)


@pytest.mark.parametrize("second", ["none", "plphp"])
@pytest.mark.parametrize("turns", ["text", "image"])
@pytest.mark.parametrize(
    ("family", "first"), [*((name, "divprune") for name in SOME), ("qwen3_vl", "fastv")]
)
def test_later_turns(family: str, first: str, turns: str, second: str) -> None:
    """The images of a later turn are chosen from too; what earlier turns lost stays lost."""
    talk = start(family, {"text": TEXT_TURN, "image": IMAGE_TURN}[turns])
    numbers, (at, make) = truth(family, 0, "three").numbers, FIRST[first]
    with plphp.prune(talk.model, [make(), *([plphp_policy(numbers)] * (second == "plphp"))]):
        talk.hold(plphp.PrunedCache(talk.model))
    earlier: list[oracle.Dropped] = []
    for turn, report in enumerate(talk.reports):
        before = max(talk.prompts[turn - 1].spans) if turn else 0
        spans = (torch.tensor([talk.prompts[turn].spans]) - before).clamp(min=0)
        if report.stages:
            earlier.append(left_out(report, spans, at))
        tokens = torch.tensor([talk.answers[turn]])
        now = [*earlier, dropped(report, spans)]
        inputs = inputs_of(talk.family, talk.prompts[turn])
        wanted = oracle.decode(talk.model, inputs, now, tokens.shape[1], tokens)[1]
        assert (talk.logits[turn] - wanted).abs().max() < LOGITS
        earlier.append(now[-1])
    assert bool(talk.reports[1].stages) == (turns == "image")


@pytest.mark.parametrize("second", ["none", "plphp"])
def test_later_turns_of_a_batch_are_those_of_its_rows(second: str) -> None:
    """Rows whose second turns keep different numbers of tokens: no filler is left between slots."""
    family = EVERY["llava"]
    model = family.build(0)
    specs = [[tiny.RowSpec(images=1, text=20), tiny.RowSpec(images=2, text=20)],
             [tiny.RowSpec(images=2, text=20), tiny.RowSpec(images=1, text=20)]]  # fmt: skip

    def answers(rows: list[int]) -> Tensor:
        cache, said, mask = plphp.PrunedCache(model), None, None
        for turn in specs:
            inputs, _ = family.make_inputs(model, [turn[row] for row in rows], 0)
            own = inputs["attention_mask"]
            said = (
                inputs["input_ids"] if said is None else torch.cat([said, inputs["input_ids"]], 1)
            )
            mask = own if mask is None else torch.cat([mask, own], 1)
            given = {**inputs, "input_ids": said, "attention_mask": mask}
            said = model.generate(**given, cache=cache, max_new_tokens=4, do_sample=False)
            mask = torch.cat([mask, mask.new_ones(len(rows), 4)], 1)
        return said[:, -4:]

    first = FIRST["divprune"][1]()
    policy = [first, plphp.PLPHP()] if second == "plphp" else first
    with plphp.prune(model, policy):
        together = answers([0, 1])
        assert torch.equal(together, torch.cat([answers([0]), answers([1])]))


@pytest.mark.parametrize("family", SOME[:3])
@pytest.mark.parametrize("second", ["none", "plphp", "pyramidkv"])
def test_a_static_cache_gives_the_same_tokens(family: str, second: str) -> None:
    expected = truth(family, 0, "batch")
    model = expected.build()
    later = [] if second == "none" else [plphp.policy(second)]
    with plphp.prune(model, [FIRST["divprune"][1](), *later]) as pruning:
        tokens, logits = generate(model, expected.inputs)
        dynamic = pruning.report
        static = plphp.PrunedCache(model, max_len=256, static=True)
        again, again_logits = generate(model, expected.inputs, cache=static)
    assert torch.equal(tokens, again)
    assert (logits - again_logits).abs().max() < LOGITS
    assert dynamic.retention == static.report.retention < 1
