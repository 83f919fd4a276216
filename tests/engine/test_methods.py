"""Every method that the plugin serves gives the answers of the same method on transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import answers
import pytest
import serving
from soak import preempt

import plphp

METHODS = {
    "plphp-shared": plphp.policy("plphp-shared", alpha=0.55, beta=0.45),
    "plphp-flat": plphp.policy("plphp-flat", budget=0.3),
    "plphp-global": plphp.policy("plphp-global", alpha=0.55, beta=0.45, r=0.3),
    "random": plphp.policy("random", seed=3),
    "uniform": plphp.policy("uniform", budget=0.2),
    "novelty": plphp.policy("novelty", budget=0.25),
    "snapkv": plphp.policy("snapkv", budget=0.25),
    "pyramidkv": plphp.policy("pyramidkv", budget=0.3),
}


SLOW = ("pyramidkv", "plphp-flat")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in METHODS]
)
def test_answers_equal_transformers(name: str, reference: Any) -> None:
    """Prompts are computed in chunks, and requests without pruning run beside."""
    asked = serving.random_requests(12, seed=list(METHODS).index(name) + 70)
    requests = [replace(r, policy=r.policy and METHODS[name], tokens=8) for r in asked]
    with serving.engine(METHODS[name], max_num_batched_tokens=128) as llm:
        before = serving.free_blocks(llm)
        outputs = serving.generate(llm, requests)
        assert serving.free_blocks(llm) == before
    pruned = 0
    for request, output in zip(requests, outputs, strict=True):
        expected = answers.answer(reference, request, answers.said(output))
        assert answers.same(output, expected) is not False, request
        if request.policy and request.images:
            told = output.kv_transfer_params["plphp"]
            assert told["retention"] == pytest.approx(expected.report.retention)
            assert told["layer_classes"] == [x.layer_class[0] for x in expected.report.layers]
            pruned += told["freed_blocks"] > 0
    assert pruned


@pytest.mark.parametrize("window", [32, pytest.param(64, marks=pytest.mark.slow)])
def test_queries_of_a_window_are_there_whatever_computes_them(window: int, reference: Any) -> None:
    """Chunks of 40 tokens split the window, the prefix cache holds it, preemptions repeat it."""
    policy = plphp.policy("snapkv", budget=0.3, window=window)
    asked = [r for r in serving.random_requests(16, seed=90, most=7) if r.images][:8]
    requests = [replace(request, policy=policy, tokens=12) for request in asked]
    with serving.engine(policy, max_num_batched_tokens=40, max_num_seqs=4) as llm:
        before, scheduler = serving.free_blocks(llm), serving.scheduler_of(llm)
        schedule, steps, thrown = scheduler.schedule, [], []

        def sometimes(*args: Any) -> Any:
            steps.append(1)
            if len(steps) in (9, 30, 70):
                thrown.extend(preempt(llm))
            return schedule(*args)

        scheduler.schedule = sometimes
        outputs = [*serving.generate(llm, requests), *serving.generate(llm, requests)]
        llm.llm_engine.step()
        assert serving.free_blocks(llm) == before and serving.state(llm) == 0
    assert any(thrown) and not all(thrown), "prompts and answers are preempted"
    hits = 0
    for request, output in zip(requests * 2, outputs, strict=True):
        assert answers.agree(output, reference, request) is not False, request
        prompt = len(output.prompt_token_ids)
        assert output.num_cached_tokens <= max(prompt - window, 0)
        hits += output.num_cached_tokens > 0
    assert hits > 1, "the prefix cache is used"
