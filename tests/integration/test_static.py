"""Static caches: the same tokens with lengths on the device, and one graph for every step."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig

import plphp
import tiny
from plphp.weights import round_weights

FAMILIES = ("qwen2_vl", "llava", "llava_onevision", "idefics2")
SOME = plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5)
GREEDY = {"max_new_tokens": 12, "do_sample": False}
MAX_LEN = 256


def case(name: str, prompts: int = 1) -> tuple[Any, list[dict[str, Tensor]]]:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    return model, [family.make_inputs(model, tiny.ROWS["batch"], i)[0] for i in range(prompts)]


def static(model: Any) -> plphp.PrunedCache:
    return plphp.PrunedCache(model, static=True, max_len=MAX_LEN)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_static_cache_gives_the_same_tokens(name: str) -> None:
    model, (inputs,) = case(name)
    with plphp.prune(model, SOME) as pruning:
        wanted = model.generate(**inputs, **GREEDY)
        dynamic = pruning.report
        cache = static(model)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache=cache), wanted)
        beams = {**GREEDY, "num_beams": 3}
        searched = model.generate(**inputs, **beams)
        again = model.generate(**inputs, **beams, cache=static(model))
        assert torch.equal(again, searched)
    for one, other in zip(dynamic.layers, cache.report.layers, strict=True):
        assert torch.equal(one.kept, other.kept)


# Dynamo alone says how many graphs there are; Inductor then compiles them for most of a minute.
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]


def compiled(name: str, backend: str = "inductor", bits: int | None = None) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(mode=None, backend=backend)
    config._compile_all_devices = True  # transformers compiles on accelerators only otherwise
    model, prompts = case(name, prompts=3)
    if bits:
        round_weights(model, bits)
    for some in (prompts[:2], prompts[2:]):
        with plphp.prune(model, SOME) as pruning:  # the second attachment takes the first's graph
            for inputs in some:
                wanted = model.generate(**inputs, **GREEDY)
                capacity = [layer.kept.shape for layer in pruning.report.layers]
                got = model.generate(**inputs, **GREEDY, cache=static(model), compile_config=config)
                assert torch.equal(got, wanted), capacity
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1, "recompiled by a step or a prompt"
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["llava", "idefics2"])
def test_a_reset_cache_fills_its_buffers_again(name: str) -> None:
    model, prompts = case(name, prompts=3)
    with plphp.prune(model, SOME):
        kept = static(model)
        places: set[tuple[int, ...]] = set()
        for turn, inputs in enumerate([*prompts, *prompts]):
            wanted = model.generate(**inputs, **GREEDY, cache=static(model))
            assert torch.equal(model.generate(**inputs, **GREEDY, cache=kept), wanted)
            if turn >= len(prompts):  # the buffers are as large as these prompts need
                places.add(tuple(t.data_ptr() for t in kept.tensors() if t.dim() != 1))
            size = kept.kv_bytes()
            kept.reset()
            assert kept.report is None and kept.get_seq_length() == 0
        assert len(places) == 1
        assert kept.kv_bytes() <= size < kept.kv_bytes() + 1000, "buffers that wait are counted"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_decoding_is_one_graph_for_every_step_and_prompt(backend: str) -> None:
    compiled("llava", backend)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_of_ones_own_is_compiled_once(backend: str) -> None:
    """Without generate(): no step, prompt or attachment is compiled again. M-RoPE adds a graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, prompts = case("qwen2_vl", prompts=3)
    compiled_step = torch.compile(model.__call__, fullgraph=True, backend=backend)
    for some in (prompts[:2], prompts[2:]):
        with plphp.prune(model, SOME), torch.inference_mode():
            for inputs in some:
                answers = [_steps(model, inputs, step) for step in (model, compiled_step)]
                assert torch.equal(*answers)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def _steps(model: Any, inputs: dict[str, Tensor], step: Any) -> Tensor:
    """The tokens of a prompt and of 5 steps, (B, 6)."""
    cache = static(model)
    tokens = [model(**inputs, cache=cache).logits[:, -1:].argmax(-1)]
    for _ in range(5):
        tokens.append(step(input_ids=tokens[-1], cache=cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_rounded_weights_are_compiled_into_one_graph_too() -> None:
    compiled("llava", bits=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted({*FAMILIES} - {"llava"}))
def test_compiled_decoding_of_every_family(name: str) -> None:
    compiled(name)


def test_later_turns_on_a_static_cache() -> None:
    model, (inputs,) = case("llava")
    row = {k: v for k, v in inputs.items() if k != "pixel_values"}
    more = torch.full((3, 5), 20)

    def talk(cache: plphp.PrunedCache) -> Tensor:
        first = model.generate(**inputs, **GREEDY, cache=cache)
        ids = torch.cat([first, more], 1)
        mask = torch.cat([row["attention_mask"], torch.ones(3, 17, dtype=torch.long)], 1)
        options = {"attention_mask": mask, **GREEDY}
        out: Tensor = model.generate(input_ids=ids, **options, cache=cache)
        return out

    with plphp.prune(model, SOME):
        wanted = talk(plphp.PrunedCache(model))
        assert torch.equal(talk(static(model)), wanted)


def test_what_does_not_fit_is_said_at_once() -> None:
    model, (inputs,) = case("llava")
    with plphp.prune(model, SOME):
        with pytest.raises(ValueError, match="needs max_len"):
            plphp.PrunedCache(model, static=True)
        small = plphp.PrunedCache(model, static=True, max_len=100)
        with pytest.raises(ValueError, match="do not fit max_len"):
            model.generate(**inputs, **GREEDY, cache=small)
        with pytest.raises(ValueError, match="max_len is 100"):
            model(**inputs, cache=small)
        cache = static(model)
        model.generate(**inputs, **GREEDY, cache=cache)
        with pytest.raises(plphp.UnsupportedModeError, match="static"):
            cache.save("nowhere.safetensors")


def test_bytes_of_a_static_cache_are_counted() -> None:
    model, (inputs,) = case("llava")
    with plphp.prune(model, SOME):
        cache = static(model)
        model.generate(**inputs, **GREEDY, cache=cache)
    storages = {}
    for owner in (cache, *(layer.store for layer in cache.layers)):
        for tensor in vars(owner).values():
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    assert cache.report.kv_bytes == cache.kv_bytes() == sum(storages.values())
