"""Models with other dtypes, attention, weights or devices, under all invariants."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from answers import KEEP_ALL, stock_fails_as_not_applicable
from methods import Method
from modes import Mode, NotApplicable
from packaging.version import Version
from torch import Tensor
from transformers import modeling_flash_attention_utils

import oracle
import plphp
from along import in_codes, kept_of, led
from invariants import (
    EVERY,
    LOGITS,
    ROWS,
    check_decoding,
    check_keeping_all,
    check_selection,
    generate,
    observe,
    per_row,
    run_policy,
    truth,
)
from plphp.weights import round_weights

INSTALLED = Version(transformers.__version__)
Setting = Callable[[Any], AbstractContextManager[Any]]


def check_setting(setting: Setting, mode: Mode, family: str, method: Method) -> None:
    """The same weights in another setting: the oracle's selection and logits still hold."""
    expected = truth(family, 0, mode.rows)
    with setting(expected.build()) as model:
        with stock_fails_as_not_applicable():
            logits = generate(model, expected.inputs, steps=1)[1]
        if (logits - expected.logits[:, :1]).abs().max() > LOGITS:
            raise NotApplicable("the unpruned model computes other logits in this mode")
        policy = method.make(expected.numbers)
        run = run_policy(model, expected.inputs, policy, recall=method.recall)
        if method.options is not None:
            check_selection(expected, run[2], **method.options)
        check_decoding(expected.build(), expected, *run)
        check_keeping_all(expected, model)
    assert run[2].retention < 1 or method.name == "full"


def check_weights(setting: Setting, mode: Mode, family: str, method: Method) -> None:
    """Other weights, which the oracle uses too."""
    plain = truth(family, 0, mode.rows)
    with setting(plain.build()) as model:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        expected = observe(base, family, mode.rows, (plain.inputs, plain.spans))
        assert (expected.logits - plain.logits).abs().max() > 1e-3, "the same weights"
        policy = method.make(expected.numbers)
        run = run_policy(model, expected.inputs, policy, recall=method.recall)
        if method.options is not None:
            check_selection(expected, run[2], **method.options)
        check_decoding(base, expected, *run)
        check_keeping_all(expected, model)
    assert run[2].retention < 1 or method.name == "full"


# --- numbers --------------------------------------------------------------------------------------

# About twice the largest differences of all families: logits, gammas, share of different choices
CODES = 0.2  # the last bit of a key may decide between two codes
ROUNDING = {torch.bfloat16: (0.5, 0.005, 0.02), torch.float16: (0.05, 0.001, 0.01)}


def check_half(dtype: torch.dtype, mode: Mode, family: str, method: Method) -> None:
    """Half precision: keys keep their dtype, scores are float32, clear tokens are equal."""
    model = EVERY[family].build(0).to(dtype)
    inputs, spans = EVERY[family].make_inputs(model, ROWS[mode.rows], 0)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    expected = observe(model, family, mode.rows, (inputs, spans))
    with plphp.prune(model, KEEP_ALL):
        tokens, logits = generate(model, inputs)
    check_sure(tokens, logits, expected.logits, model)
    with method.attach(model, expected.numbers):
        cache = plphp.PrunedCache(model)
        tokens, logits = generate(model, inputs, cache=cache)
    assert all(layer.store.keys.dtype == dtype for _, layer in cache.pruned_layers())
    assert cache.report.retention < 1 or method.name == "full"
    if method.options is not None:
        check_near(expected.select(**method.options), cache.report, ROUNDING[dtype])
    wanted = led(model, inputs, spans, cache.report, tokens)
    check_sure(tokens, logits, wanted, model, CODES if in_codes(cache.report) else 0)


def check_sure(
    tokens: Tensor, logits: Tensor, wanted: Tensor, model: Any, least: float = 0
) -> None:
    """Logits are near in each row, up to a token that depends on rounding.

    Rounding also decides which expert a token goes to. In such models most steps are near.
    """
    off = max(ROUNDING[model.dtype][0], least)
    routed = any("experts" in name for name, _ in model.named_parameters())
    distance = (logits - wanted).abs().amax(-1)
    margin = wanted.topk(2).values.diff().abs()[..., 0]
    same = tokens == wanted.argmax(-1)
    together = same.cumprod(-1).roll(1, -1).bool()  # up to the first token that differs
    together[:, 0] = True
    if routed:
        assert distance[together].median() < off
        return
    assert distance[together].max() < off
    assert (margin[together & ~same] < 2 * off).all()


def check_near(selection: oracle.Selection, report: Any, rounding: tuple[float, ...]) -> None:
    """Gammas are near, and few choices differ in layers whose class is clear."""
    _, gamma_off, share = rounding
    differing = 0
    for choices, layer in zip(selection.choices, report.layers, strict=True):
        wanted = [choice.gamma for choice in choices]
        assert per_row(layer.gamma) == pytest.approx(wanted, abs=gamma_off, nan_ok=True)
        for row, choice in enumerate(choices):
            for head, kept in enumerate(choice.kept):
                got = set(layer.kept[row, head].tolist()) - {-1}
                differing += len(kept ^ got) if len(kept) == len(got) else 0
    assert differing <= share * oracle.compare(selection, kept_of(report)).total


# --- attention ------------------------------------------------------------------------------------


@contextmanager
def attention(name: str, model: Any) -> Iterator[Any]:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        raise NotApplicable(f"transformers does not support {name} for this model") from error
    torch._dynamo.reset()  # torch 2.13's C++ of a kernel for changing shapes does not compile
    assert model.get_decoder().config._attn_implementation == name
    yield model


def flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    cap: float | None,
) -> Tensor:
    """What a FlashAttention kernel computes: (B, T, H, D), causal from the bottom right."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    logits = q.transpose(1, 2) @ k.transpose(2, 3) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    if causal:
        seen = torch.ones(logits.shape[-2:], dtype=torch.bool).tril(k.shape[2] - q.shape[1])
        near = torch.ones_like(seen).triu(k.shape[2] - q.shape[1] + 1 - (window or k.shape[2]))
        logits = logits.masked_fill(~(seen & near), -torch.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **kw: Any
) -> Tensor:
    queries, keys = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    rows = [
        (slice(queries[i], queries[i + 1]), slice(keys[i], keys[i + 1]))
        for i in range(len(queries) - 1)
    ]
    return torch.cat([flash(q[a][None], k[b][None], v[b][None], **kw)[0] for a, b in rows])


@contextmanager
def flash_attention(model: Any) -> Iterator[Any]:
    """A replacement for the kernels; names, layouts and masks are transformers' own."""
    utils = modeling_flash_attention_utils
    calls: list[int] = []

    def one(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        calls.append(q.shape[1])
        return flash(q, k, v, **{name: options[name] for name in ("scale", "causal", *MORE)})

    def varlen(*args: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **options: Any) -> Tensor:
        calls.append(-1)
        kept = {name: options[name] for name in ("scale", "causal", *MORE)}
        return flash_varlen(*args, cu_seqlens_q, cu_seqlens_k, **kept)

    def arguments(**given: Any) -> dict[str, Any]:
        return {
            "scale": given["softmax_scale"],
            "causal": given["is_causal"] and given["query_length"] > 1,
            "window": given.get("sliding_window"),
            "cap": given.get("softcap"),
        }

    process = arguments if Version("5.19") > INSTALLED else (arguments, None)
    kernels = ((one, varlen, None, utils._pad_input, utils._unpad_input), process)
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    with mock.patch.object(utils, "lazy_import_flash_attention", return_value=kernels):
        yield model
    assert calls, "the kernel was never called"


MORE = ("window", "cap")

# --- weights --------------------------------------------------------------------------------------


@contextmanager
def lora(model: Any) -> Iterator[Any]:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    yield peft.get_peft_model(model, config).eval()


@contextmanager
def int4(model: Any) -> Iterator[Any]:
    round_weights(model, 4)
    yield model


@contextmanager
def int8(model: Any) -> Iterator[Any]:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.get_decoder(), quantization.Int8WeightOnlyConfig())
    yield model


# --- devices --------------------------------------------------------------------------------------


@contextmanager
def offloaded(model: Any) -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@contextmanager
def spread(model: Any) -> Iterator[Any]:
    """A device_map with every other decoder layer on the disk."""
    pytest.importorskip("accelerate")
    with TemporaryDirectory() as name:
        home = Path(name)
        model.save_pretrained(home / "model")
        placed = type(model).from_pretrained(
            home / "model", device_map=device_map(model), offload_folder=home / "offload"
        )
        placed.generation_config.eos_token_id = None
        parts = list(placed.get_decoder().layers[1].parameters())
        assert all(part.device.type == "meta" for part in parts)
        yield placed.eval()


def device_map(model: Any) -> dict[str, str]:
    """A device for every module by its name, layer by layer in the decoder."""
    decoder = model.get_decoder()
    path = next(name for name, module in model.named_modules() if module is decoder)
    opened = ["", *(path.rsplit(".", i)[0] for i in reversed(range(path.count(".") + 1)))]
    placed: dict[str, str] = {}
    for name in opened:
        inner = model.get_submodule(name)
        parts = [*inner.named_children(), *inner.named_parameters(recurse=False)]
        children = {f"{name}.{part}".strip("."): "cpu" for part, _ in parts}
        placed.pop(name, None)
        placed |= children
    placed.pop(f"{path}.layers")
    for index in range(len(decoder.layers)):
        placed[f"{path}.layers.{index}"] = "disk" if index % 2 else "cpu"
    return placed


SDPA, EAGER, FLEX = (partial(attention, name) for name in ("sdpa", "eager", "flex_attention"))
