"""Tokens from vLLM equal those of plphp on transformers, in all modes with one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import answers
import pytest
import serving
from vllm import SamplingParams

import plphp

# name -> options of the engine
MODES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "chunks of 48": {"max_num_batched_tokens": 48, "max_num_seqs": 4},
    "chunks of 97, no prefix cache": {
        "max_num_batched_tokens": 97,
        "max_num_seqs": 6,
        "enable_prefix_caching": False,
    },
    "in place": {"share_prefix": False, "max_num_batched_tokens": 256},
    "blocks of 64": {"block_size": 64},
}


@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_transformers(mode: str, reference: Any) -> None:
    requests = serving.random_requests(40, seed=0)  # the same, so that transformers answers once
    block = MODES[mode].get("block_size", serving.BLOCK)
    with serving.engine(**MODES[mode]) as llm:
        before = serving.free_blocks(llm)
        outputs = serving.generate(llm, requests)
        assert serving.free_blocks(llm) == before
    close, classes = 0, set()
    for request, output in zip(requests, outputs, strict=True):
        expected = answers.answer(reference, request, answers.said(output), block)
        found = answers.same(output, expected)
        assert found is not False, (request, output.outputs[0].token_ids, expected.tokens)
        close += found is None
        if request.policy and request.images:
            told = output.kv_transfer_params["plphp"]
            assert told["layer_classes"] == [x.layer_class[0] for x in expected.report.layers]
            assert told["retention"] == pytest.approx(expected.report.retention)
            classes |= set(told["layer_classes"])
    assert close <= 1
    assert len(classes) == 3


def test_reading_an_answer_is_as_good_as_generating_it(reference: Any) -> None:
    for request in serving.random_requests(8, seed=0):
        inputs = answers.inputs_of(reference, request)
        wanted = answers.generated(reference.model, inputs, request)
        found = answers.answer(reference, request, wanted.tokens)
        assert found.tokens == wanted.tokens and found.length == wanted.length
        assert found.margins == pytest.approx(wanted.margins, rel=1e-3, abs=1e-4)
        wrong = [*wanted.tokens[:1], wanted.tokens[0] ^ 1, *wanted.tokens[2:]]
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=wrong)])
        assert wrong == wanted.tokens or not answers.agree(output, reference, request)


@dataclass(frozen=True)
class EqualCounts(plphp.PLPHP):
    """`layers_per_group` in transformers: a layer keeps as many tokens as the most of its group."""

    group: int = 1

    @property
    def kind(self) -> str:
        return "layers"

    def plan_all(self, looks: Any) -> Any:
        from plphp.policy import steps
        from plphp.policy.view import pack

        counted = [self.rounded_counts(look.rate, look.spans, self.round_to) for look in looks]
        plans = []
        for index, (look, (quota, _)) in enumerate(zip(looks, counted, strict=True)):
            first = index // self.group * self.group
            most = max(int(total) for _, total in counted[first : first + self.group])
            keep = steps.select(look.scores, look.spans, quota, quota.new_tensor([most]))
            plans.append(pack(keep, look.gamma, look.rate, look.classes))
        return plans


@pytest.mark.parametrize("layers", [2, serving.LAYERS // 2, serving.LAYERS])
def test_layers_that_share_blocks_keep_as_much(layers: int, reference: Any) -> None:
    requests = [r for r in serving.random_requests(14, seed=50) if r.policy]
    with serving.engine(layers_per_group=layers) as llm:
        assert len(serving.scheduler_of(llm).connector.groups) == serving.LAYERS // layers
        outputs = serving.generate(llm, requests)
    for request, output in zip(requests, outputs, strict=True):
        options = {name: getattr(request.policy, name) for name in request.policy.__dict__}
        policy = EqualCounts(**options, group=layers)
        grouped = replace(request, policy=policy)
        assert answers.agree(output, reference, grouped) is not False


def test_keep_all_is_the_stock_engine() -> None:
    requests = serving.random_requests(12, seed=9)
    chats, plain = [r.chat for r in requests], SamplingParams(temperature=0, max_tokens=16)
    with serving.engine(plphp.PLPHP(r=1, delta_r=0)) as llm:
        mine = llm.chat(chats, plain, use_tqdm=False)
    with serving.engine(stock=True) as llm:
        stock = llm.chat(chats, plain, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in mine] == [o.outputs[0].token_ids for o in stock]
