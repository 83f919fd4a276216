"""What the inspector says of recall is what a cache logs, step by step."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from asking import QUESTION, asked, bits, eager_attention

import plphp
from plphp.bench import Way
from plphp.demo.model import Embedded
from plphp.hf.shared_prefill import read
from plphp.inspector.examine import examine
from plphp.inspector.steps import steps_of


def test_with_recall_steps_say_what_was_read_and_fetched(embedded: Embedded) -> None:
    """What a run of its own logs; what came is what a head did not have the step before."""
    pictures, inputs = asked(embedded)
    model, recall = embedded.model, plphp.Recall("host", 0.4)
    policies = {"plphp": plphp.PLPHP()}
    page = examine(
        embedded, inputs, policies, pictures, QUESTION, rounds=1, oracle=True, recall=recall
    )
    run = json.loads(json.dumps(page.to_json()))["runs"][0]
    steps = run["steps"]
    with torch.inference_mode(), plphp.prune(model, recall=replace(recall, record=True)) as pruning:
        cache = plphp.PrunedCache(model)
        out = model.generate(**inputs, cache=cache, do_sample=False)
    answer = out[0, inputs["input_ids"].shape[1] :]
    assert embedded.decode(answer) == run["answer"]["text"]
    vision = (plphp.vision_spans(model.config, **inputs)[0] > 0).nonzero()[:, 0]
    log = cache.recalled()
    assert len(steps["read"]) == len(answer) - 1 == len(log[0])
    came = [0] * len(log[0])
    for layer, held in enumerate(log):
        before = [set(bits(text, len(vision))) for text in run["layers"][layer]["kept"]]
        for step, heads in enumerate(held):
            now = [set(bits(text, len(vision))) for text in steps["read"][step][layer]]
            assert [vision[sorted(head)].tolist() for head in now] == heads[0].tolist()
            came[step] += sum(len(b - a) for a, b in zip(before, now, strict=True))
            before = now
    assert steps["fetched"] == [0, *came] and sum(came) > 0
    assert run["recall"] == pruning.report.recall.to_dict()
    for layer, probs in enumerate(eager_attention(model, inputs, answer)):
        for step, heads in enumerate(log[layer]):
            read_here = torch.stack([torch.isin(vision, head) for head in heads[0]])
            look = probs[:, step + 1][:, vision]
            group = len(look) // len(read_here)
            to_read = (look * read_here.repeat_interleave(group, 0)).sum(-1)
            to_rest = look.sum(-1) - to_read
            found = [steps[name][step + 1][layer] for name in ("full_kept", "lost")]
            assert found == pytest.approx([float(to_read.mean()), float(to_rest.mean())], abs=2e-4)
            if layer == 0:  # as above: what was not read changes only the softmax
                own = float((to_read / (1 - to_rest)).mean())
                assert steps["kept"][step + 1][0] == pytest.approx(own, abs=2e-4)


def test_reads_of_a_long_answer_are_cut_where_the_page_would_grow(embedded: Embedded) -> None:
    _, inputs = asked(embedded)
    model = embedded.model
    with torch.inference_mode():
        prompt = read(model, inputs)
    answer = torch.full((9,), int(prompt.first))
    way = Way("recall", plphp.PLPHP(), plphp.Recall("host"))
    every, some = (
        steps_of(model, inputs, way, prompt, answer, byte_limit=byte_limit)
        for byte_limit in (10**6, 2000)
    )
    assert len(every.read) == 8 and len(every.fetched) == 9
    assert 0 < len(some.read) < 8 and some.read == every.read[: len(some.read)]
    assert len(json.dumps(some.read)) <= 2000 and some.fetched == every.fetched


@pytest.mark.parametrize("home", ["int4", "int2"])
def test_codes_are_all_read(embedded: Embedded, home: str) -> None:
    """Nothing is lost, and attention is the full model's but for what rounding does to keys."""
    pictures, inputs = asked(embedded)
    policies, recall = {"plphp": plphp.PLPHP()}, plphp.Recall(home)
    page = examine(
        embedded, inputs, policies, pictures, QUESTION, rounds=1, oracle=True, recall=recall
    )
    steps, told = page.runs[0].steps, page.runs[0].recall
    assert steps.read == () and steps.fetched == ()
    assert all(value == 0 for row in steps.lost for value in row)
    assert steps.kept[0] == steps.full_kept[0]
    first = [(own[0], full[0]) for own, full in zip(steps.kept, steps.full_kept, strict=True)]
    assert all(own == pytest.approx(full, abs=0.1) for own, full in first)
    assert told["home"] == home and 0 < told["resident"] < told["full"] and told["parked"] > 0


def test_kept_codes_are_read_one_token_at_a_time(embedded: Embedded) -> None:
    """The attention to what was kept is that without codes, but for what rounding does to keys."""
    pictures, inputs = asked(embedded)
    policies = {"plphp": plphp.PLPHP()}
    options: dict[str, Any] = {"rounds": 1, "oracle": True, "max_new_tokens": 5}
    plain, coded = (
        examine(embedded, inputs, policies, pictures, QUESTION, kv_bits=bits, **options).runs[0]
        for bits in (None, 4)
    )
    assert plain.codes is None and coded.codes["bits"] == 4
    assert coded.codes["share"] < coded.retention == plain.retention
    assert coded.kv_bytes < plain.kv_bytes
    assert [a.kept for a in coded.layers] == [a.kept for a in plain.layers]
    assert len(coded.steps.kept) == len(coded.answer.tokens)
    pairs = zip(coded.steps.kept[1], plain.steps.kept[1], strict=True)
    assert all(own == pytest.approx(other, abs=0.1) for own, other in pairs)
