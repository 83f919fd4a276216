"""Methods that use more than the last token or more than one layer, on a real model."""

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

import plphp
import tiny
from invariants import generate, state_of, truth

WINDOWED = ["snapkv", "pyramidkv", "vl-cache"]


def selection(report: Any) -> list[list[int]]:
    return [layer.kept.tolist() for layer in report.layers]


@pytest.fixture
def expected() -> Any:
    return truth("qwen2_vl", 0, "batch")


@pytest.mark.skipif(
    Version("5.23") > Version(transformers.__version__),
    reason="transformers reads prompts with pixels in chunks from 5.23 on",
)
@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("size", [7, 16, 500])
def test_a_prompt_in_chunks_is_pruned_as_the_whole(expected: Any, name: str, size: int) -> None:
    """Chunks of 7 split the window of 32 last tokens over five forwards."""
    model = expected.build()
    with plphp.prune(model, plphp.policy(name)) as pruning:
        tokens, _ = generate(model, expected.inputs)
        whole = selection(pruning.report)
        pieces, _ = generate(model, expected.inputs, prefill_chunk_size=size)
        assert selection(pruning.report) == whole
    assert torch.equal(tokens, pieces)


@pytest.mark.parametrize("name", ["vl-cache", "plphp", "snapkv"])
def test_a_static_cache_holds_the_same(expected: Any, name: str) -> None:
    model = expected.build()
    policy = plphp.policy(name, budget=0.3)
    with plphp.prune(model, policy) as pruning:
        tokens, _ = generate(model, expected.inputs)
        dynamic = selection(pruning.report)
        cache = plphp.PrunedCache(model, max_len=320, static=True)
        static, _ = generate(model, expected.inputs, cache=cache, disable_compile=True)
        assert selection(cache.report) == dynamic
    assert torch.equal(tokens, static)


@pytest.mark.parametrize("name", ["vl-cache", "plphp"])
def test_drafts_stay_behind_a_prompt_that_is_planned_last(name: str) -> None:
    expected = truth("qwen2_vl", 0, "one")
    model = expected.build()
    with plphp.prune(model, plphp.policy(name, budget=0.3)):
        tokens, _ = generate(model, expected.inputs)
        looked_up, _ = generate(model, expected.inputs, prompt_lookup_num_tokens=3)
    assert torch.equal(tokens, looked_up)


def test_planning_together_says_that_the_peak_is_the_whole_cache(expected: Any) -> None:
    model = expected.build()
    with plphp.prune(model, plphp.policy("vl-cache")) as pruning:
        generate(model, expected.inputs, steps=2)
        assert any("were planned together after the last" in note for note in pruning.report.notes)


def test_an_exception_between_layers_leaves_a_cache_that_says_so(expected: Any) -> None:
    model = expected.build()
    last = model.get_decoder().layers[-1]

    def fail(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    with plphp.prune(model, plphp.policy("vl-cache")):
        cache = plphp.PrunedCache(model)
        handle = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, expected.inputs, cache=cache)
        handle.remove()
        with pytest.raises(plphp.UnsupportedModeError, match="interrupted"):
            generate(model, expected.inputs, cache=cache)


@pytest.mark.parametrize("name", ["plphp", "vl-cache", "fastv"])
def test_a_cache_is_freed_with_its_last_reference(expected: Any, name: str) -> None:
    """It must not wait for Python's garbage collector, which would keep gigabytes on a GPU."""
    model = expected.build()
    gc.collect()
    gc.disable()
    try:
        with plphp.prune(model, plphp.policy(name)):
            cache = plphp.PrunedCache(model)
            generate(model, expected.inputs, steps=3, cache=cache)
            held = weakref.ref(next(iter(cache.pruned_layers()))[1].store.keys)
            del cache
            assert held() is None
    finally:
        gc.enable()


def test_a_method_that_makes_images_smaller_is_refused() -> None:
    model = tiny.FAMILIES["llava"].build(0)
    with pytest.raises(plphp.UnsupportedModeError, match="makes the images smaller"):
        plphp.prune(model, plphp.policy("downsample"))


def test_calibration_fits_the_model_and_leaves_it_alone(expected: Any) -> None:
    model = expected.build()
    generate(model, expected.inputs, steps=1)
    before = state_of(model)
    found = plphp.calibrate(model, [expected.inputs] * 8, budget=0.3)
    assert state_of(model) == before
    with plphp.prune(model, found) as pruning:
        generate(model, expected.inputs, steps=1)
        classes = {c for layer in pruning.report.layers for c in layer.layer_class} - {None}
        assert len(classes) == 3
        assert 0.2 < pruning.report.retention < 0.4
    text, _ = tiny.FAMILIES["qwen2_vl"].make_inputs(model, [tiny.NONE], seed=0)
    with pytest.raises(plphp.InputError, match="needs samples with images"):
        plphp.calibrate(model, [text])
    with pytest.raises(plphp.InputError, match="several prompts, got one: give a list"):
        plphp.calibrate(model, text)
    with pytest.raises(TypeError, match="each of the samples must be a mapping"):
        plphp.calibrate(model, [list(text)])
    assert plphp.attached(model) is None
