"""Every method that the plugin serves gives the answers of the same method on transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import serving

import plphp

METHODS = {
    "plphp-shared": plphp.policy("plphp-shared", alpha=0.55, beta=0.45),
    "plphp-flat": plphp.policy("plphp-flat", budget=0.3),
    "plphp-global": plphp.policy("plphp-global", alpha=0.55, beta=0.45, r=0.3),
    "random": plphp.policy("random", seed=3),
    "uniform": plphp.policy("uniform", budget=0.2),
    "novelty": plphp.policy("novelty", budget=0.25),
}


@pytest.mark.parametrize("name", METHODS)
def test_answers_equal_transformers(name: str, reference: Any) -> None:
    """Prompts are computed in chunks, and requests without pruning run beside."""
    asked = serving.random_requests(12, seed=list(METHODS).index(name) + 70)
    requests = [replace(r, policy=r.policy and METHODS[name]) for r in asked]
    with serving.engine(METHODS[name], max_num_batched_tokens=128) as llm:
        before = serving.free_blocks(llm)
        outputs = serving.generate(llm, requests)
        assert serving.free_blocks(llm) == before
    pruned = 0
    for request, output in zip(requests, outputs, strict=True):
        expected = serving.answer(reference, request)
        assert serving.same(output, expected) is not False, request
        if request.policy and request.images:
            told = output.kv_transfer_params["plphp"]
            assert told["retention"] == pytest.approx(expected.report.retention)
            assert told["layer_classes"] == [x.layer_class[0] for x in expected.report.layers]
            pruned += told["freed_blocks"] > 0
    assert pruned
