"""Options and modes that cannot work are refused when the engine is configured."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import serving
import torch
import vllm
from prometheus_client import REGISTRY
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec

import plphp
from plphp.vllm.attach import check_layer
from plphp.vllm.checks import check_modes, measured
from plphp.vllm.connector import check_blocks
from plphp.vllm.options import Options

POLICY = plphp.PLPHP(alpha=0.55, beta=0.45)
MORE = serving.LAYERS + 1


def config_of(**options: Any) -> Any:
    """vLLM's config of these arguments, made in the process that the user starts."""
    return EngineArgs(model=str(serving.WEIGHTS), block_size=32, **options).create_engine_config()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"r": 2}, r"r \+ delta_r"),
        ({"alpha": 0.1, "beta": 0.2}, "beta"),
        ({"rate": 0.5}, "no option 'rate'"),
        ({"round_to": 8}, "no option 'round_to'"),
        ({"budget": 0.2}, "budget"),
        ({"layers_per_group": 0}, "layers_per_group"),
        ({"share_prefix": "yes"}, "share_prefix"),
    ],
)
def test_bad_options_stop_before_a_model_is_loaded(extra: dict[str, Any], message: str) -> None:
    args = plphp.vllm.engine_args()
    args["kv_transfer_config"]["kv_connector_extra_config"] = extra
    with pytest.raises(ValueError, match=message):
        config_of(**args)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "a fp8 KV cache (leave out --kv-cache-dtype)"),
        (
            {"disable_hybrid_kv_cache_manager": True},
            "--disable-hybrid-kv-cache-manager (leave it out)",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism (use tensor parallelism)"),
        ({"data_parallel_size": 2}, "data parallelism (start several servers)"),
        pytest.param(
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            "a bfloat16 KV cache (leave out --kv-cache-dtype)",
            marks=pytest.mark.skipif(
                not vllm.__version__.startswith("0.32"), reason="vLLM 0.33 refuses it itself"
            ),
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative decoding (leave out --speculative-config)",
        ),
        ({"runner": "pooling"}, "pooling, which does not decode"),
        ({"video_pruning_rate": 0.5}, "video pruning (leave out --video-pruning-rate)"),
    ],
)
def test_modes_that_cannot_be_pruned_in_are_refused(options: Any, message: str) -> None:
    config = config_of(**plphp.vllm.engine_args(), **options)
    with pytest.raises(plphp.UnsupportedModeError, match=re.escape(message)):
        check_modes(config, Options())


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        ("parallel_config", "enable_dbo", True, "leave out --enable-dbo and --ubatch-size"),
        ("parallel_config", "ubatch_size", 2, "leave out --enable-dbo and --ubatch-size"),
        ("parallel_config", "decode_context_parallel_size", 2, "context parallelism"),
        ("parallel_config", "prefill_context_parallel_size", 2, "context parallelism"),
    ],
)
def test_modes_that_this_machine_does_not_have_are_refused(
    owner: str, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**plphp.vllm.engine_args())
    check_modes(config, Options())
    part = getattr(config, owner) if owner else config
    monkeypatch.setattr(type(part), name, value)
    vars(part).pop(name, None)
    with pytest.raises(plphp.UnsupportedModeError, match=message):
        check_modes(config, Options())


def test_a_cache_in_the_models_own_type_is_accepted() -> None:
    args = plphp.vllm.engine_args()
    check_modes(config_of(**args, kv_cache_dtype="bfloat16", dtype="bfloat16"), Options())


def test_graphs_that_record_prompts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(**plphp.vllm.engine_args(full_graphs=True))
    modes = type(config.compilation_config.cudagraph_mode)
    for name in ("NONE", "PIECEWISE", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"):
        monkeypatch.setattr(config.compilation_config, "cudagraph_mode", modes[name])
        check_modes(config, Options(full_graphs=True))
    monkeypatch.setattr(config.compilation_config, "cudagraph_mode", modes.FULL)
    check_modes(config, Options())  # vLLM changes the mode before it records
    with pytest.raises(plphp.UnsupportedModeError, match=r"\(use FULL_AND_PIECEWISE\)"):
        check_modes(config, Options(full_graphs=True))


def test_the_role_of_a_consumer_is_refused() -> None:
    args = plphp.vllm.engine_args()
    args["kv_transfer_config"]["kv_role"] = "kv_consumer"
    message = r"the role kv_consumer \(use kv_producer\)"
    with pytest.raises(plphp.UnsupportedModeError, match=message):
        check_modes(config_of(**args), Options())


def test_all_that_has_to_change_is_said_at_once() -> None:
    config = config_of(**plphp.vllm.engine_args(), kv_cache_dtype="fp8", pipeline_parallel_size=2)
    with pytest.raises(plphp.UnsupportedModeError) as refusal:
        check_modes(config, Options(layers_per_group=MORE))
    assert str(refusal.value) == (
        "PLPHPConnector does not work with pipeline parallelism (use tensor parallelism), "
        "a fp8 KV cache (leave out --kv-cache-dtype), "
        f"layers_per_group={MORE} (use a divisor of {serving.LAYERS} layers)"
    )


def test_another_accelerator_is_refused_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(current_platform, "device_type", "xpu")
    transfer = KVTransferConfig(**plphp.vllm.engine_args()["kv_transfer_config"])
    message = "vLLM on cpu, cuda only, and this engine runs on xpu"
    with pytest.raises(plphp.UnsupportedModeError, match=message):
        KVConnectorFactory.get_connector_class(transfer)
    other = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(other).__name__ == "ExampleConnector"


def test_a_gpu_gets_piecewise_graphs_and_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(current_platform, "device_type", "cuda")
    transfer = KVTransferConfig(**plphp.vllm.engine_args()["kv_transfer_config"])
    connector = KVConnectorFactory.get_connector_class(transfer)
    assert connector.requires_piecewise_for_cudagraph(transfer.kv_connector_extra_config)
    extra = transfer.kv_connector_extra_config | {"full_graphs": True}
    assert not connector.requires_piecewise_for_cudagraph(extra)
    assert "has not yet been run on cuda" in measured("cuda")
    assert "has not" not in measured("cpu")


def test_blocks_that_a_backend_splits_are_refused() -> None:
    cache = torch.zeros(8, 2, 64, 32)  # (blocks, Hkv, block, 2 D)
    layer = SimpleNamespace(kv_cache=cache)
    check_blocks("layer", layer, 64)
    message = "splits blocks of 128 tokens into blocks of 64: use --block-size 64"
    with pytest.raises(plphp.UnsupportedModeError, match=message):
        check_blocks("layer", layer, 128)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"head_size_v": 16}, "its keys and values have unequal head sizes"),
        ({"dtype": torch.float8_e4m3fn}, r"its cache is quantized \(torch.float8_e4m3fn\)"),
    ],
)
def test_caches_that_cannot_be_read_are_refused(changed: Any, reason: str) -> None:
    options = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
    backend = SimpleNamespace(get_name=lambda: "FLASH_ATTN")
    layer: Any = SimpleNamespace(layer_name="layer", attn_backend=backend, impl=None)
    model = SimpleNamespace(dtype=torch.float32, is_mm_prefix_lm=False)
    check_layer(layer, FullAttentionSpec(**options), model)
    with pytest.raises(plphp.UnsupportedModelError, match=reason):
        check_layer(layer, FullAttentionSpec(**options | changed), model)


def test_other_connectors_beside_it_are_refused() -> None:
    example = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    mine = plphp.vllm.engine_args()["kv_transfer_config"]
    config_of(kv_transfer_config=several(example, example))
    with pytest.raises(plphp.UnsupportedModeError, match="inside a MultiConnector: use it alone"):
        config_of(kv_transfer_config=several(example, mine))
    with pytest.raises(plphp.UnsupportedModeError, match="leave out --kv-offloading-size"):
        config_of(**plphp.vllm.engine_args(), kv_offloading_size=1)


@pytest.mark.parametrize("name", ["PlphpConnector", "PLHPConnector", "plphp"])
def test_a_mistyped_name_is_corrected(name: str) -> None:
    args = plphp.vllm.engine_args()
    args["kv_transfer_config"]["kv_connector"] = name
    message = f"kv_connector must be 'PLPHPConnector', got '{name}'"
    with pytest.raises(ValueError, match=message):
        config_of(**args)


def several(*connectors: dict[str, Any]) -> KVTransferConfig:
    return KVTransferConfig(
        kv_connector="MultiConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"connectors": list(connectors)},
    )


def test_an_engine_that_cannot_prune_does_not_start() -> None:
    message = rf"layers_per_group={MORE} \(use a divisor of {serving.LAYERS} layers\)"
    with pytest.raises(plphp.UnsupportedModeError, match=message):  # noqa: SIM117
        with serving.engine(layers_per_group=MORE):
            pass


def test_a_request_with_bad_options_is_left_alone_and_counted() -> None:
    requests = [serving.Request((serving.picture(1),), "describe picture 1.", POLICY, 4)] * 2
    with serving.engine(disable_log_stats=False) as llm:
        bad = requests[0].sampling
        bad.extra_args = {"plphp.r": 7}
        chats = [request.chat for request in requests]
        left, pruned = llm.chat(chats, [bad, requests[1].sampling], use_tqdm=False)
    assert "r + delta_r" in left.kv_transfer_params["plphp"]["refused"]
    assert "retention" in pruned.kv_transfer_params["plphp"]
    found = {
        (sample.name, sample.labels.get("reason"))
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name.startswith("vllm:plphp") and sample.value
    }
    assert ("vllm:plphp_prompts_refused_total", "bad options") in found
    assert ("vllm:plphp_prompts_pruned_total", None) in found


def test_one_server_serves_both() -> None:
    image = (serving.picture(1),)
    off = serving.Request(image, "describe picture 1.", None, 4)
    on = serving.Request(image, "describe picture 1.", POLICY, 4)
    with serving.engine(POLICY, on=False) as llm:
        quiet, asked = serving.generate(llm, [off, on])
    assert quiet.kv_transfer_params is None
    assert asked.kv_transfer_params["plphp"]["retention"] <= 1
