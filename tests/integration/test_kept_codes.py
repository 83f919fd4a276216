"""Kept tokens in codes (`kv_bits`), against the oracle, which rounds them itself in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch

import plphp
from along import check_greedy, check_logits, led
from invariants import STEPS, check_selection, generate, plphp_policy, truth

# a pairwise sample of families with other masks, windows and kinds of layers, and prompts
CELLS = [
    ("qwen2_vl", "batch", 4),
    ("qwen2_vl", "three", 2),
    ("qwen3_5", "one", 4),
    ("gemma3", "batch", 2),
    ("gemma3", "one", 4),
    ("llava", "three", 4),
    ("idefics3", "touching", 2),
    ("internvl", "batch", 4),
]


@pytest.mark.parametrize(("family", "rows", "bits"), CELLS)
def test_logits_are_those_of_rounded_tokens(family: str, rows: str, bits: int) -> None:
    expected = truth(family, 0, rows)
    model = expected.build()
    policy = plphp_policy(expected.numbers)
    with plphp.prune(model, policy, kv_bits=bits) as pruning:
        tokens, logits = generate(model, expected.inputs)
    report = pruning.report
    check_selection(expected, report)
    wanted = led(expected.build(), expected.inputs, expected.spans, report, tokens)
    check_logits(logits, wanted, report)
    check_greedy(tokens, wanted, report)
    assert (report.codes.bits, report.codes.text) == (bits, False)
    assert report.codes.share < report.retention


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_reported_bytes_are_those_of_the_tensors(family: str) -> None:
    expected = truth(family, 0, "one")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=4) as pruning:
        cache = plphp.PrunedCache(model)
        generate(model, expected.inputs, cache=cache)
    layers, report = [layer for _, layer in cache.pruned_layers()], pruning.report
    texts = int((expected.spans == 0).sum())
    for layer in layers:  # no vision token is left in the store
        assert layer.store.end - (STEPS - 1) == texts
    packed = sum(x.nbytes for layer in layers for x in layer.codes.parked())
    in_full = [layer for layer in report.layers if not layer.pruned]
    held = sum(layer.kept.numel() for layer in in_full) * 2 * layers[0].store.keys.shape[-1] * 4
    assert report.codes.device == packed + held
    assert report.on_device == report.codes.share == report.codes.device / report.codes.full


@pytest.mark.parametrize("bits", [4, 2])
def test_text_in_codes(bits: int) -> None:
    expected = truth("qwen2_vl", 0, "five")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=bits, kv_text=True) as pruning:
        cache = plphp.PrunedCache(model)
        tokens, logits = generate(model, expected.inputs, cache=cache)
    wanted = led(expected.build(), expected.inputs, expected.spans, pruning.report, tokens)
    check_logits(logits, wanted, pruning.report)
    texts = int((expected.spans == 0).sum())
    assert texts > 32
    assert all(layer.store.end == 32 + STEPS - 1 for _, layer in cache.pruned_layers())


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 2}, {"prefill_chunk_size": 16}, {"prompt_lookup_num_tokens": 2}],
    ids=["beams", "chunks", "assisted"],
)
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    """Chunks and guessed tokens give the answer of a plain call; beams run."""
    expected = truth("qwen2_vl", 0, "one")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=4) as pruning:
        plain, _ = generate(model, expected.inputs)
        tokens = model.generate(
            **expected.inputs, max_new_tokens=STEPS, do_sample=False, **options
        )[:, expected.spans.shape[1] :]
    if "num_beams" not in options:
        assert torch.equal(tokens, plain)
    assert pruning.report.codes.bits == 4


@pytest.mark.parametrize("policy", ["full", "snapkv", "vl-cache", "plphp-global", "fastv"])
def test_other_methods(policy: str) -> None:
    """Every kind of method: by layer, over all layers, and one that drops hidden states."""
    expected = truth("qwen2_vl", 0, "one")
    model = expected.build()
    with plphp.prune(model, policy, kv_bits=4) as pruning:
        plain = pruning.report
        generate(model, expected.inputs)
    assert plain is None and pruning.report.codes.share < 0.5 * pruning.report.retention


def turns(model: Any, cache: Any, inputs: dict[str, torch.Tensor], many: int) -> torch.Tensor:
    """Later turns of text only, after the first prompt. Returns the whole conversation."""
    said = model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False)
    for turn in range(many):
        new = torch.full((len(said), 3), 7 + turn)
        said = torch.cat([said, new], 1)
        said = model.generate(input_ids=said, cache=cache, max_new_tokens=4, do_sample=False)
    return said


def test_codes_of_earlier_turns_stay_as_they_are() -> None:
    """After eight turns the codes of the images are, byte for byte, those of the first."""
    expected = truth("llava", 0, "three")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=2):
        cache = plphp.PrunedCache(model)
        turns(model, cache, expected.inputs, 0)
        first = [layer.codes.keys.dense().clone() for _, layer in cache.pruned_layers()]
        counts = [layer.codes.keys.tokens for _, layer in cache.pruned_layers()]
        del cache
        cache = plphp.PrunedCache(model)
        turns(model, cache, expected.inputs, 8)
    for (_, layer), keys, count in zip(cache.pruned_layers(), first, counts, strict=True):
        assert layer.codes.keys.tokens == count and not layer.decoded
        assert torch.equal(layer.codes.keys.dense(), keys)


def test_text_of_later_turns_joins_in_groups_of_its_own() -> None:
    expected = truth("llava", 0, "five")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=4, kv_text=True):
        cache = plphp.PrunedCache(model)
        turns(model, cache, expected.inputs, 0)
        before = [(x.codes.keys.tokens, x.codes.keys.dense()) for _, x in cache.pruned_layers()]
        del cache
        cache = plphp.PrunedCache(model)
        turns(model, cache, expected.inputs, 2)
    for (_, layer), (count, keys) in zip(cache.pruned_layers(), before, strict=True):
        codes, columns = layer.codes, int(layer.get_seq_length())
        assert codes.keys.tokens > count
        assert torch.equal(codes.keys.dense()[:, :, :count], keys)
        values = codes.values.dense().shape[2]
        assert values == codes.keys.tokens == codes.present().shape[1]
        assert layer.store.end + int(codes.present().sum(-1)[0]) <= columns


def test_a_saved_conversation_goes_on(tmp_path: Path) -> None:
    expected = truth("llava", 0, "one")
    model = expected.build()
    with plphp.prune(model, plphp_policy(expected.numbers), kv_bits=4):
        cache = plphp.PrunedCache(model)
        said = turns(model, cache, expected.inputs, 0)
        cache.save(tmp_path / "talk")
        said = torch.cat([said, torch.full((1, 3), 7)], 1)
        answers = [
            model.generate(input_ids=said, cache=one, max_new_tokens=4, do_sample=False)
            for one in (plphp.PrunedCache.load(model, tmp_path / "talk"), cache)
        ]
    assert torch.equal(*answers)
    with (
        plphp.prune(model, plphp_policy(expected.numbers)),
        pytest.raises(plphp.InputError, match="saved with"),
    ):
        plphp.PrunedCache.load(model, tmp_path / "talk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_bits": 3}, "must be 4 or 2"),
        ({"kv_text": True}, "needs kv_bits"),
        ({"kv_bits": 4, "recall": "host"}, "leave one of them out"),
    ],
    ids=["three", "text", "recall"],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model = truth("llava", 0, "one").build()
    with pytest.raises((ValueError, plphp.UnsupportedModeError), match=message):
        plphp.prune(model, **options)


def test_static_caches_are_refused() -> None:
    model = truth("llava", 0, "one").build()
    with plphp.prune(model, kv_bits=4), pytest.raises(plphp.UnsupportedModeError, match="static"):
        plphp.PrunedCache(model, max_len=64, static=True)
