"""A cache that is planned after a shared prefill equals the cache of a run of its own."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import plphp
import tiny
from invariants import STEPS, generate, truth
from plphp.hf import compat
from plphp.hf.shared_prefill import read
from plphp.policy import POLICIES

METHODS = [name for name in POLICIES if POLICIES[name]().prunes_cache]


@pytest.mark.parametrize("family", tiny.CORE)
@pytest.mark.parametrize("rows", ["one", "batch"])
def test_a_cache_planned_from_a_shared_prefill_equals_a_run_of_its_own(
    family: str, rows: str
) -> None:
    expected = truth(family, 0, rows)
    model = expected.build()
    prompt = read(model, expected.inputs, window=40)
    for name in METHODS:
        if plphp.policy(name).window > 40:
            continue  # vl-cache and tgv-kv look at 64 tokens
        with plphp.prune(model, plphp.policy(name)) as pruning:
            tokens, logits = generate(model, expected.inputs)
            wanted = pruning.report
            cache = prompt.pruned(pruning)
            report = cache.report  # of the prompt; the next turn has another one
            rest, rest_logits = follow(model, expected.inputs, prompt, cache)
        assert torch.equal(torch.cat([prompt.first, rest], 1), tokens), name
        assert (rest_logits - logits[:, 1:]).abs().max() < 1e-4
        assert report is not None
        for one, other in zip(report.layers, wanted.layers, strict=True):
            assert torch.equal(one.kept, other.kept)
            assert one.layer_class == other.layer_class
        assert report.retention == wanted.retention


def follow(model: Any, inputs: dict[str, Any], prompt: Any, cache: Any) -> Any:
    """The rest of the answer, after the first token, which all policies share."""
    ids = torch.cat([inputs["input_ids"], prompt.first], 1)
    more = {}
    if "attention_mask" in inputs:
        more["attention_mask"] = torch.cat(
            [inputs["attention_mask"], torch.ones_like(prompt.first)], 1
        )
    return generate(model, {"input_ids": ids, **more}, STEPS - 1, cache=cache)


def test_one_shared_prefill_serves_many_policies_and_is_not_changed() -> None:
    expected = truth("qwen2_vl", 0, "batch")
    model = expected.build()
    prompt = read(model, expected.inputs)
    held = prompt.cache.kv_bytes()
    for _ in range(2):
        with plphp.prune(model, plphp.policy("vl-cache", budget=0.2)) as pruning:
            small = prompt.pruned(pruning)
            assert small.kv_bytes() < held
    with plphp.prune(model, plphp.policy("full")) as pruning:
        rest, _ = follow(model, expected.inputs, prompt, prompt.pruned(pruning))
    assert torch.equal(torch.cat([prompt.first, rest], 1), expected.tokens)
    assert prompt.cache.kv_bytes() == held


@pytest.mark.parametrize("name", ["fastv", "vtw", "snapkv"])
def test_what_cannot_be_planned_afterwards_says_so(name: str) -> None:
    expected = truth("llava", 0, "one")
    model = expected.build()
    prompt = read(model, expected.inputs, window=8)
    with (
        plphp.prune(model, plphp.policy(name)) as pruning,
        pytest.raises(plphp.UnsupportedModeError, match="cannot be planned afterwards"),
    ):
        prompt.pruned(pruning)


@pytest.mark.parametrize("family", [*tiny.CORE, "idefics2_window"])
def test_the_stock_cache_is_that_of_a_run_without_plphp(family: str) -> None:
    expected = truth(family, 0, "crossing" if family == "idefics2_window" else "batch")
    model = expected.build()
    made = read(model, expected.inputs).stock()
    wanted = DynamicCache(config=compat.text_config(model))
    options = {compat.CACHE: wanted, "max_new_tokens": 1, "do_sample": False}
    model.generate(**expected.inputs, **options)
    assert type(made) is DynamicCache and made.get_seq_length() == wanted.get_seq_length()
    for one, other in zip(made.layers, wanted.layers, strict=True):
        assert type(one) is type(other)
        mask = expected.inputs.get("attention_mask", expected.inputs["input_ids"])
        real = (mask[:, -one.keys.shape[2] :] > 0)[:, None, :, None]
        for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
            assert mine.shape == theirs.shape
            assert ((mine - theirs) * real).abs().max() < 1e-5
