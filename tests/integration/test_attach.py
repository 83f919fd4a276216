"""Attaching: what is refused and when, what remains afterwards, and the memory of a prefill."""

import copy
import gc
import threading
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import plphp
import tiny
from plphp.cache import allocated
from plphp.policy import KeepPlan, LayerView, Policy
from versions import cache_of

QWEN = tiny.FAMILIES["qwen2_vl"]
TEXT_ONLY = [tiny.RowSpec(images=0, text=20)]
ONE = [tiny.RowSpec(images=1, text=20)]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def model() -> torch.nn.Module:
    return QWEN.build(0)


def prompt(model: torch.nn.Module, rows: list[tiny.RowSpec] = ONE) -> dict[str, Tensor]:
    inputs: dict[str, Tensor] = QWEN.make_inputs(model, rows, 0)[0]
    return inputs


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "paged"},
        {"output_attentions": True},
        {"custom_generate": "someone/somewhere"},
    ],
    ids=lambda o: "-".join(map(str, *o.items())),
)
def test_modes_that_cannot_prune_are_refused(
    model: torch.nn.Module, options: dict[str, object]
) -> None:
    with plphp.prune(model) as pruning:
        with pytest.raises(plphp.UnsupportedModeError):
            model.generate(**prompt(model), **GREEDY, **options)
        assert pruning.report is None


def test_caches_of_the_users_own_are_refused(model: torch.nn.Module) -> None:
    config = model.config.get_text_config()
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=200)):
        with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="PrunedCache"):
            model.generate(**prompt(model), **GREEDY, cache=cache)
        with plphp.prune(model), pytest.raises(plphp.UnsupportedModeError, match="PrunedCache"):
            model(**prompt(model), cache=cache)


def test_refusals_beyond_generate(model: torch.nn.Module) -> None:
    with plphp.prune(model):
        with pytest.raises(plphp.UnsupportedModeError, match="attached already"):
            plphp.prune(model)
        with pytest.raises(plphp.UnsupportedModeError, match="generate_batch"):
            model.generate_batch([[1, 2, 3]])
        with pytest.raises(plphp.UnsupportedModeError, match="cache"):
            model(**prompt(model), use_cache=False)
        with pytest.raises(plphp.UnsupportedModeError, match="copied"):
            copy.deepcopy(model)
        with pytest.raises(plphp.UnsupportedModeError, match="prune was given"):
            model.model.language_model(torch.tensor([[9, 10]]))
    with pytest.raises(plphp.UnsupportedModeError, match="attached"):
        plphp.PrunedCache(model)


def test_two_caches_in_one_call_are_refused(model: torch.nn.Module) -> None:
    with plphp.prune(model):
        one, other = (plphp.PrunedCache(model) for _ in range(2))
        for call in (model, model.generate):
            with pytest.raises(plphp.InputError, match="are two caches"):
                call(**prompt(model), cache=one, past_key_values=other)
        model.generate(**prompt(model), **GREEDY, cache=one, past_key_values=one)
    assert one.get_seq_length() > other.get_seq_length() == 0


def test_a_forgotten_pruning_is_found_on_the_model(model: torch.nn.Module) -> None:
    pruning = plphp.prune(model)
    assert plphp.attached(model) is pruning
    pruning.remove()
    assert plphp.attached(model) is None


def test_a_report_is_short_where_python_shows_it(model: torch.nn.Module) -> None:
    with plphp.prune(model) as pruning:
        model.generate(**prompt(model), **GREEDY)
    report = pruning.report
    assert report is not None and report.summary in repr(report)
    assert len(repr(report)) < 200 and len(repr(report.layers[0])) < 400


def test_models_without_vision_are_refused() -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    llama = LlamaForCausalLM(config)
    with pytest.raises(plphp.UnsupportedModelError, match="vision"):
        plphp.prune(llama)
    assert "generate" not in vars(llama)
    with pytest.raises(plphp.UnsupportedModelError, match="transformers model"):
        plphp.prune(torch.nn.Linear(2, 2))
    with pytest.raises(plphp.UnsupportedModelError, match="from_pretrained"):
        plphp.prune("some/model")
    with pytest.raises(plphp.UnsupportedModelError, match=r"pass its `\.model`"):
        plphp.prune(SimpleNamespace(model=QWEN.build(0)))


def silent_llama() -> LlamaForCausalLM:
    """A model whose config names no vision tokens."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_a_vision_mask_serves_where_the_config_is_silent() -> None:
    llama = silent_llama()
    ids = torch.arange(2, 42)[None]
    mask = torch.zeros(1, 40, dtype=torch.long)
    mask[:, 5:25] = 1
    for given in (mask, lambda input_ids: mask):
        policy = plphp.PLPHP(r=0.5, delta_r=0)
        with plphp.prune(llama, policy, vision_mask=given) as pruning:
            llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert pruning.report.retention == 0.5
        assert pruning.report.images == (1,)


def test_a_vision_mask_may_number_images_of_earlier_turns() -> None:
    llama = silent_llama()
    ids = torch.arange(2, 42)[None]

    def numbered(input_ids: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros_like(input_ids)
        mask[:, 5:25] = torch.arange(1, 21)
        return mask

    with plphp.prune(llama, vision_mask=numbered) as pruning:
        cache = plphp.PrunedCache(llama)
        out = llama.generate(ids, **GREEDY, cache=cache)
        assert pruning.report.images == (20,)
        more = torch.cat([out, torch.full((1, 3), 7)], 1)
        llama.generate(more, **GREEDY, cache=cache)
        assert pruning.report.images == (0,)


def test_a_vision_mask_with_numbers_that_no_row_has_is_refused() -> None:
    llama = silent_llama()
    ids = torch.arange(2, 42)[None]
    with (
        plphp.prune(llama, vision_mask=torch.full_like(ids, 41)),
        pytest.raises(ValueError, match="41"),
    ):
        llama.generate(ids, **GREEDY)


def test_a_text_only_prompt_is_no_error(model: torch.nn.Module) -> None:
    inputs = prompt(model, TEXT_ONLY)
    wanted = model.generate(**inputs, **GREEDY)
    with plphp.prune(model) as pruning:
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)
    assert pruning.report.retention == 1.0
    assert "nothing was pruned" in str(pruning.report)
    assert pruning.report.to_dict()["layers"][0]["gamma"] == [None]


def test_a_bare_forward_treats_its_input_as_the_prompt(model: torch.nn.Module) -> None:
    inputs = prompt(model)
    with plphp.prune(model) as pruning:
        wanted = model.generate(**inputs, **GREEDY)
        by_generate = pruning.report
        out = model(**inputs)
        assert pruning.report.to_dict() == by_generate.to_dict()
        ids = inputs["input_ids"]
        for _ in range(GREEDY["max_new_tokens"]):
            token = out.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, token], 1)
            out = model(token, cache=cache_of(out))
        assert pruning.report.to_dict() == by_generate.to_dict()
    assert torch.equal(ids, wanted)


def test_an_interrupted_prompt_spoils_its_cache_only(model: torch.nn.Module) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("in the middle of a prompt")

    inputs = prompt(model)
    with plphp.prune(model):
        wanted = model.generate(**inputs, **GREEDY)
        cache = plphp.PrunedCache(model)
        handle = model.model.language_model.layers[2].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model.generate(**inputs, **GREEDY, cache=cache)
        handle.remove()
        with pytest.raises(plphp.UnsupportedModeError, match="interrupted"):
            model.generate(**inputs, **GREEDY, cache=cache)
        assert torch.equal(model.generate(**inputs, **GREEDY), wanted)


def test_two_models_in_two_threads_do_not_affect_each_other() -> None:
    models = [QWEN.build(seed) for seed in (0, 1)]
    inputs = [QWEN.make_inputs(m, ONE, seed)[0] for seed, m in enumerate(models)]
    options = {"max_new_tokens": 12, "do_sample": False}
    with plphp.prune(models[0]):
        wanted = [m.generate(**i, **options) for m, i in zip(models, inputs, strict=True)]
        got: dict[int, list[Tensor]] = {0: [], 1: []}

        def work(which: int) -> None:
            for _ in range(3):
                got[which].append(models[which].generate(**inputs[which], **options))

        threads = [threading.Thread(target=work, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for which in (0, 1):
        assert len(got[which]) == 3
        assert all(torch.equal(out, wanted[which]) for out in got[which])


@dataclass
class Watching(Policy):
    """A policy that records the bytes of keys and values that are allocated when it is called."""

    inner: plphp.PLPHP
    heads: int
    dim: int
    seen: list[int] = field(default_factory=list)
    others: set[int] = field(default_factory=set)  # storages that existed before

    def plan(self, view: LayerView) -> KeepPlan:
        self.seen.append(self.alive())
        return self.inner.plan(view)

    def alive(self) -> int:
        # type() and not isinstance, which makes some lazy modules of other libraries import things
        tensors = [o for o in gc.get_objects() if type(o) is Tensor]
        kv = [t for t in tensors if t.dim() == 4 and t.shape[1::2] == (self.heads, self.dim)]
        return allocated(t for t in kv if t.untyped_storage().data_ptr() not in self.others)


def test_prefill_holds_at_most_two_full_layers_beside_the_pruned(model: torch.nn.Module) -> None:
    text = model.config.get_text_config()
    heads, dim = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    policy = Watching(plphp.PLPHP(r=0.1, delta_r=0), heads, dim)
    inputs = prompt(model, [tiny.RowSpec(images=3, text=20)])
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is Tensor]
    policy.others = {t.untyped_storage().data_ptr() for t in tensors}
    with plphp.prune(model, policy), torch.no_grad():
        out = model(**inputs)
    cache = cache_of(out)
    full = 2 * inputs["input_ids"].shape[1] * heads * dim * 4
    assert cache.report.kv_bytes_full == full * text.num_hidden_layers
    # When layer l is planned, the l layers before it are pruned and one or two are full.
    pruned = [allocated(layer.store.tensors()) for layer in cache.layers]
    for layer, alive in enumerate(policy.seen):
        assert full <= alive <= sum(pruned[:layer]) + 2 * full
    assert policy.alive() <= sum(pruned)


def test_shared_configs_are_never_written_to(model: torch.nn.Module) -> None:
    before = model.config.to_dict(), sorted(vars(model.config.get_text_config()))
    with plphp.prune(model):
        model.generate(**prompt(model), **GREEDY)
        assert (model.config.to_dict(), sorted(vars(model.config.get_text_config()))) == before
    assert (model.config.to_dict(), sorted(vars(model.config.get_text_config()))) == before


def test_lengths_are_logical_and_memory_is_physical(model: torch.nn.Module) -> None:
    inputs = prompt(model)
    length = inputs["input_ids"].shape[1]
    with plphp.prune(model, plphp.PLPHP(r=0.1, delta_r=0)), torch.no_grad():
        cache = cache_of(model(**inputs))
    for layer in range(len(cache.layers)):
        assert cache.get_seq_length(layer) == length
        assert cache.get_mask_sizes(1, layer) == (length + 1, 0)
        assert cache.layers[layer].store.keys.shape[2] < length


def test_a_refused_call_leaves_a_kept_cache_usable(model: torch.nn.Module) -> None:
    inputs = prompt(model)
    with plphp.prune(model):
        wanted = model.generate(**inputs, **GREEDY)
        cache = plphp.PrunedCache(model)
        with pytest.raises(ValueError, match="nonsense"):
            model.generate(**inputs, **GREEDY, nonsense=1, cache=cache)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache=cache), wanted)


def test_a_cache_uses_the_policy_that_is_attached_now(model: torch.nn.Module) -> None:
    inputs = prompt(model)
    with plphp.prune(model, plphp.PLPHP(r=1, delta_r=0)):
        cache = plphp.PrunedCache(model)
    with plphp.prune(model, plphp.PLPHP(r=0.25, delta_r=0)):
        model.generate(**inputs, **GREEDY, cache=cache)
    assert cache.report.retention == pytest.approx(0.25, abs=0.02)
    other = QWEN.build(0)
    with plphp.prune(other), pytest.raises(plphp.UnsupportedModeError, match="another model"):
        other.generate(**inputs, **GREEDY, cache=cache)
