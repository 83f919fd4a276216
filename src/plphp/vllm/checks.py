"""What vLLM can do and pruning cannot, refused when the engine starts."""

from __future__ import annotations

from typing import Any

from plphp.errors import UnsupportedModeError, UnsupportedVllmError
from plphp.vllm.options import CONNECTOR, Options

VLLM = "0.32"  # the minor version whose internals this was written against
PLATFORMS = ("cpu",)  # what has an attention backend in `layout`
MARKS = {"r", "delta_r", "layers_per_group"}  # options by which a config is known to be ours


def check_version(found: str) -> None:
    """Raise UnsupportedVllmError for another minor version of vLLM."""
    if found.split(".")[:2] != VLLM.split("."):
        raise UnsupportedVllmError(
            f"plphp prunes in vLLM {VLLM}, found {found}: pip install 'vllm=={VLLM}.*'"
        )


def check_platform(found: str) -> None:
    """Raise UnsupportedModeError where no attention backend is known, before a model is loaded."""
    if found not in PLATFORMS:
        raise UnsupportedModeError(
            f"{CONNECTOR} works with vLLM's {', '.join(PLATFORMS)} backend only so far, "
            f"and this is {found}: start vLLM without it"
        )


def check_alone(transfer: Any) -> None:
    """Raise UnsupportedModeError for the KVTransferConfig of another connector that holds ours."""
    given = transfer.kv_connector_extra_config
    if transfer.kv_connector == "MultiConnector":
        if any(one["kv_connector"] == CONNECTOR for one in given.get("connectors", ())):
            raise UnsupportedModeError(
                f"{CONNECTOR} does not work in a MultiConnector: use it alone"
            )
    elif transfer.kv_connector != CONNECTOR and MARKS & given.keys():
        raise UnsupportedModeError(
            f"{transfer.kv_connector} has taken the place of {CONNECTOR}: "
            "leave out --kv-offloading-size"
        )


def check_modes(vllm_config: Any, options: Options) -> None:
    """Raise UnsupportedModeError, saying what to change, for modes that cannot be pruned in."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    layers = model.get_total_num_hidden_layers()
    context = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    refused = {
        "asynchronous scheduling (add --no-async-scheduling)": scheduler.async_scheduling,
        "speculative decoding (leave out --speculative-config)": vllm_config.speculative_config,
        "pipeline parallelism (use tensor parallelism)": parallel.pipeline_parallel_size > 1,
        "context parallelism (use tensor parallelism)": context > 1,
        f"a {cache.cache_dtype} KV cache (leave out --kv-cache-dtype)": cache.cache_dtype != "auto",
        "Model Runner V2 (set VLLM_USE_V2_MODEL_RUNNER=0)": vllm_config.use_v2_model_runner,
        "--disable-hybrid-kv-cache-manager (leave it out)": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "bidirectional attention among image tokens": model.is_mm_prefix_lm,
        "vLLM's own video pruning (leave out --video-pruning-rate)": (
            model.multimodal_config and model.multimodal_config.video_pruning_rate
        ),
        "pooling, which has no decoding to save": model.runner_type != "generate",
        f"layers_per_group={options.layers_per_group} (use a divisor of {layers} layers)": (
            layers % options.layers_per_group
        ),
    }
    found = [what for what, holds in refused.items() if holds]
    if found:
        raise UnsupportedModeError(f"{CONNECTOR} does not work with {', '.join(found)}")
