"""Ways of generating: each with pruning attached is what it is without, or what greedy is.

With a keep-all policy every mode equals the untouched model; with a real one, modes that only
differ in how tokens are asked for (streams, chunks, wrappers, threads) equal plain generate().
"""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    modeling_flash_attention_utils,
)
from transformers.generation.streamers import BaseStreamer

import plphp
import tiny
from plphp.cache import KVStore

FAMILIES = ("qwen2_vl", "llava", "llava_onevision", "idefics2")
KEEP_ALL = plphp.PLPHP(r=1, delta_r=0)
SOME = plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.5)
GREEDY = {"max_new_tokens": 8, "do_sample": False}

INSTALLED = Version(transformers.__version__)
right_beams = pytest.mark.skipif(
    Version("5.19") > INSTALLED,
    reason="this transformers hands the beams of one row the images of another",
)
every_family = pytest.mark.parametrize("name", FAMILIES)


def case(name: str, rows: str = "batch") -> tuple[Any, dict[str, Tensor]]:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    return model, family.make_inputs(model, tiny.ROWS[rows], 0)[0]


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(7)
    out: Tensor = model.generate(**{**GREEDY, **inputs, **options})
    return out


class Banned(LogitsProcessor):
    """Forbids the token that greedy decoding takes at every third step."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 3:
            return scores
        return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)


MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "beams": lambda: {"num_beams": 3},
    "sampled beams": lambda: {"num_beams": 3, "do_sample": True},
    "return sequences": lambda: {"do_sample": True, "num_return_sequences": 2},
    "beams returned": lambda: {"num_beams": 4, "num_return_sequences": 2},
    "processor": lambda: {"logits_processor": LogitsProcessorList([Banned()])},
    "criteria": lambda: {"stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(110)])},
    "repetition": lambda: {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "cache dynamic": lambda: {"cache_implementation": "dynamic"},
    "config": lambda: {
        "generation_config": GenerationConfig(
            cache_implementation="dynamic", max_new_tokens=5, do_sample=False, pad_token_id=0
        )
    },
}


@pytest.mark.parametrize("mode", MODES)
@every_family
def test_keep_all_in_every_mode_is_the_untouched_model(name: str, mode: str) -> None:
    model, inputs = case(name)
    wanted = generate(model, inputs, **MODES[mode]())
    with plphp.prune(model, KEEP_ALL) as pruning:
        assert torch.equal(generate(model, inputs, **MODES[mode]()), wanted)
    assert pruning.report.retention == 1.0


@right_beams
@every_family
def test_beams_prune_as_greedy_does_and_report_expanded_rows(name: str) -> None:
    model, inputs = case(name)
    with plphp.prune(model, SOME) as pruning:
        generate(model, inputs)
        single = pruning.report
        generate(model, inputs, num_beams=3)
        for one, many in zip(single.layers, pruning.report.layers, strict=True):
            assert torch.equal(many.kept, one.kept.repeat_interleave(3, dim=0))
            assert many.layer_class == tuple(c for c in one.layer_class for _ in range(3))
    assert single.retention < 1


@right_beams
@every_family
def test_pruned_beams_of_a_batch_are_those_of_its_rows(name: str) -> None:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    rows = tiny.ROWS["batch"]
    with plphp.prune(model, SOME):
        together, _ = family.make_inputs(model, rows, 0)
        batch = generate(model, together, num_beams=3)[:, together["input_ids"].shape[1] :]
        for row, spec in enumerate(rows):
            alone, _ = family.make_inputs(model, [spec], 0)
            got = generate(model, alone, num_beams=3)[0, alone["input_ids"].shape[1] :]
            assert torch.equal(got, batch[row])


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


@every_family
def test_streams_say_what_is_returned(name: str) -> None:
    model, inputs = case(name, "three")
    heard = Heard()
    with plphp.prune(model, SOME):
        wanted = generate(model, inputs)
        generate(model, inputs, streamer=heard)
    assert heard.tokens == wanted[0].tolist()


@pytest.mark.skipif(
    Version("5.23") > INSTALLED,
    reason="this transformers cannot read prompts with pixels in chunks",
)
@pytest.mark.parametrize("size", [1, 7, 16, 1000])
@every_family
def test_chunks_are_pruned_once_by_the_prompts_last_token(name: str, size: int) -> None:
    model, inputs = case(name, "three")
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
        whole = pruning.report
        assert torch.equal(generate(model, inputs, prefill_chunk_size=size), wanted)
    for one, many in zip(whole.layers, pruning.report.layers, strict=True):
        assert torch.equal(one.kept, many.kept)
        assert one.gamma == pytest.approx(many.gamma, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_family
def test_half_precision_keeps_its_dtype_and_its_scores_are_float32(
    name: str, dtype: torch.dtype
) -> None:
    model, inputs = case(name)
    with plphp.prune(model, SOME) as pruning:
        generate(model, inputs)
        exact = pruning.report
    model = model.to(dtype)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    wanted = generate(model, half)
    with plphp.prune(model, KEEP_ALL):
        assert torch.equal(generate(model, half), wanted)
    with plphp.prune(model, SOME) as pruning:
        cache = plphp.PrunedCache(model)
        generate(model, half, past_key_values=cache)
        assert all(layer.store.keys.dtype == dtype for layer in cache.layers)
    for one, other in zip(exact.layers, pruning.report.layers, strict=True):
        assert other.gamma == pytest.approx(one.gamma, abs=0.05, nan_ok=True)


@every_family
def test_eager_prefill_prunes_as_sdpa_does(name: str) -> None:
    model, inputs = case(name)
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
        by_sdpa = pruning.report
        model.set_attn_implementation("eager")  # while attached: read at every call
        assert torch.equal(generate(model, inputs), wanted)
    for one, other in zip(by_sdpa.layers, pruning.report.layers, strict=True):
        assert torch.equal(one.kept, other.kept)


def test_the_first_forward_of_prompt_lookup_holds_guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above relies on."""
    model, inputs = case("llava", "three")
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, 1:3]
    columns: list[int] = []
    split = KVStore.split

    def noted(store: KVStore, guesses: int) -> tuple[Tensor, Tensor]:
        columns.append(guesses)
        return split(store, guesses)

    monkeypatch.setattr(KVStore, "split", noted)
    with plphp.prune(model, SOME):
        generate(model, inputs, prompt_lookup_num_tokens=3)
    assert columns == [3] * len(columns) != []


@pytest.mark.parametrize("how", ["prompt lookup", "same model", "other model"])
@every_family
def test_assisted_decoding_says_what_greedy_says(name: str, how: str) -> None:
    """The first forward may hold guesses: they are no prompt, and what is wrong is taken back."""
    model, inputs = case(name, "three")
    ids = inputs["input_ids"].clone()
    ids[:, -2:] = ids[:, 1:3]  # so that prompt lookup guesses from the first forward on
    inputs = {**inputs, "input_ids": ids, "max_new_tokens": 20}
    other = tiny.FAMILIES[name].build(1 if how == "other model" else 0)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "same model": {"assistant_model": other},
        "other model": {"assistant_model": other},
    }[how]
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
        greedy = pruning.report
        got = generate(model, inputs, **options)
    assert torch.equal(got, wanted)
    for one, assisted in zip(greedy.layers, pruning.report.layers, strict=True):
        assert torch.equal(one.kept, assisted.kept)


def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, **_: Any) -> Tensor:
    """What a FlashAttention kernel computes: (B, T, H, D), causal from the bottom right."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ k.transpose(2, 3) * softmax_scale
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[1])
        logits = logits.masked_fill(~seen, -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **kw: Any
) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = range(len(queries) - 1)
    return torch.cat(
        [
            flash(
                q[queries[i] : queries[i + 1]][None],
                k[keys[i] : keys[i + 1]][None],
                v[keys[i] : keys[i + 1]][None],
                **kw,
            )[0]
            for i in rows
        ]
    )


@pytest.mark.parametrize("rows", ["three", "batch"])
def test_the_flash_attention_path_is_called_as_by_the_model(
    monkeypatch: pytest.MonkeyPatch, rows: str
) -> None:
    """A stand-in for the kernels: names, layouts and masks are transformers' own."""
    utils = modeling_flash_attention_utils
    calls: list[int] = []

    def counted(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(q.shape[1])
        return flash(q, k, v, options["softmax_scale"], options["causal"])

    def varlen(*args: Tensor, **options: Any) -> Tensor:
        calls.append(-1)
        return flash_varlen(*args, **options)

    def arguments(
        *, query_length: int, is_causal: bool, softmax_scale: float | None, **_: Any
    ) -> dict[str, Any]:
        return {"causal": is_causal and query_length > 1, "softmax_scale": softmax_scale}

    process = arguments if Version("5.19") > INSTALLED else (arguments, None)
    kernels = ((counted, varlen, None, utils._pad_input, utils._unpad_input), process)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *a, **k: kernels)
    model, inputs = case("llava", rows)
    with plphp.prune(model, SOME):
        wanted = generate(model, inputs)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with plphp.prune(model, SOME) as pruning:
        got = generate(model, inputs)
    assert torch.equal(got, wanted)
    assert pruning.report.retention < 1
    assert len(calls) == len(pruning.report.layers), "prefill only: decode is ours"


@pytest.mark.slow  # compiles
def test_flex_attention_prefill() -> None:
    family = tiny.FAMILIES.get("qwen3_vl_moe")
    if family is None:
        pytest.skip("no tiny model of a class that supports flex attention")
    model = family.build(0)
    inputs = family.make_inputs(model, tiny.ROWS["three"], 0)[0]
    with plphp.prune(model, SOME):
        wanted = generate(model, inputs)
        model.set_attn_implementation("flex_attention")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(generate(model, inputs), wanted)


@pytest.mark.filterwarnings("ignore")
def test_peft_wrapped_models() -> None:
    peft = pytest.importorskip("peft")
    model, inputs = case("qwen2_vl")
    with plphp.prune(model, SOME) as pruning:
        wanted = generate(model, inputs)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval()
    with plphp.prune(wrapped, SOME) as pruning:
        assert not torch.equal(generate(wrapped, inputs), wanted)  # the adapter is in use
        assert pruning.report.retention < 1
        with wrapped.disable_adapter():
            assert torch.equal(generate(wrapped, inputs), wanted)
    with plphp.prune(wrapped, KEEP_ALL):
        kept = generate(wrapped, inputs)
    assert torch.equal(kept, generate(wrapped, inputs))


@pytest.mark.filterwarnings("ignore")
def test_int8_weights() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = case("qwen2_vl")
    quantization.quantize_(model.model.language_model, quantization.Int8WeightOnlyConfig())
    wanted = generate(model, inputs)
    with plphp.prune(model, KEEP_ALL):
        assert torch.equal(generate(model, inputs), wanted)
    with plphp.prune(model, SOME) as pruning:
        generate(model, inputs)
    assert pruning.report.retention < 1


@pytest.mark.filterwarnings("ignore")
def test_offloaded_weights() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, inputs = case("qwen2_vl")
    with plphp.prune(model, SOME):
        wanted = generate(model, inputs)
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with plphp.prune(model, SOME):
        assert torch.equal(generate(model, inputs), wanted)


@pytest.mark.filterwarnings("ignore")
def test_layers_on_two_devices(tmp_path: Path) -> None:
    """device_map with half of the decoder on the disk: each layer's plan is made where it runs."""
    pytest.importorskip("accelerate")
    model, inputs = case("llava")
    with plphp.prune(model, SOME):
        wanted = generate(model, inputs)
    model.save_pretrained(tmp_path / "model")
    placed = {name: "cpu" for name, _ in model.named_children()}
    placed |= {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    del placed["model"], placed["model.language_model"]
    decoder = model.get_decoder()
    placed |= {f"model.language_model.{name}": "cpu" for name, _ in decoder.named_children()}
    del placed["model.language_model.layers"]
    for layer in range(len(decoder.layers)):
        placed[f"model.language_model.layers.{layer}"] = "disk" if layer % 2 else "cpu"
    spread = (
        type(model)
        .from_pretrained(tmp_path / "model", device_map=placed, offload_folder=tmp_path / "offload")
        .eval()
    )
    spread.generation_config.eos_token_id = None
    assert spread.get_decoder().layers[1].self_attn.q_proj.weight.device.type == "meta"
    with plphp.prune(spread, SOME) as pruning:
        assert torch.equal(generate(spread, inputs), wanted)
    assert pruning.report.retention < 1


@every_family
def test_two_threads_on_one_model_are_exact(name: str) -> None:
    family = tiny.FAMILIES[name]
    model = family.build(0)
    prompts = [
        family.make_inputs(model, [tiny.RowSpec(images=1, text=30 + i)], i)[0] for i in range(2)
    ]
    reports: dict[int, list[Any]] = {0: [], 1: []}
    got: dict[int, list[Tensor]] = {0: [], 1: []}
    with plphp.prune(model, SOME):
        wanted = [model.generate(**p, max_new_tokens=16, do_sample=False) for p in prompts]

        def work(which: int) -> None:
            for _ in range(4):
                cache = plphp.PrunedCache(model)
                out = model.generate(
                    **prompts[which], max_new_tokens=16, do_sample=False, past_key_values=cache
                )
                got[which].append(out)
                reports[which].append(cache.report)

        threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for which in (0, 1):
        assert len(got[which]) == 4
        assert all(torch.equal(out, wanted[which]) for out in got[which])
        lengths = {report.prompt for report in reports[which]}
        assert lengths == {(prompts[which]["input_ids"].shape[1],)}
