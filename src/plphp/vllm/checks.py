"""Checks at the start of the engine: modes of vLLM in which pruning does not work are refused."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from plphp.errors import UnsupportedModeError
from plphp.vllm.options import CONNECTOR, Options

PLATFORMS = ("cpu", "cuda")  # platforms with an attention backend in `layout`
PLPHP_OPTIONS = {"r", "delta_r", "layers_per_group"}  # options that only plphp's connector has


def check_platform(found: str) -> None:
    """Raise UnsupportedModeError for a platform for which no attention backend was tried.

    found: vLLM's device type. This runs before a model is loaded.
    """
    if found not in PLATFORMS:
        raise UnsupportedModeError(
            f"{CONNECTOR} supports vLLM on {', '.join(PLATFORMS)} only, and this engine runs on "
            f"{found}: start vLLM without {CONNECTOR}"
        )


def measured(platform: str) -> str:
    """What the start log says about the tests of this engine's platform, vLLM's device type."""
    if platform == "cpu":
        return "PLPHPConnector has been run on CPUs only, where its tokens equal transformers'"
    return (
        f"PLPHPConnector has not yet been run on {platform}: tokens, speed and memory are measured "
        "with vLLM's CPU platform only, where torch stands in for the GPU's kernels. Compare "
        "answers with those of plphp on transformers first (docs/vllm.md)"
    )


def check_alone(transfer: Any, known: Container[str]) -> None:
    """Raise UnsupportedModeError for another connector that contains or replaces plphp's.

    transfer: vLLM's KVTransferConfig
    known: names of connectors. Raises ValueError for an unknown one that must mean plphp's
    """
    given = transfer.kv_connector_extra_config
    name = transfer.kv_connector or ""
    meant = "plphp" in name.lower() or PLPHP_OPTIONS & given.keys()
    if meant and name not in known and not transfer.kv_connector_module_path:
        raise ValueError(f"kv_connector must be {CONNECTOR!r}, got {name!r}")
    if transfer.kv_connector == "MultiConnector":
        if any(one["kv_connector"] == CONNECTOR for one in given.get("connectors", ())):
            raise UnsupportedModeError(
                f"{CONNECTOR} does not work inside a MultiConnector: use it alone"
            )
    elif transfer.kv_connector != CONNECTOR and PLPHP_OPTIONS & given.keys():
        raise UnsupportedModeError(
            f"{transfer.kv_connector} has replaced {CONNECTOR}: leave out --kv-offloading-size"
        )


def check_groups(pruned: int, all_groups: int, options: Options) -> None:
    """Raise UnsupportedModeError for layers that share a table beside layers that are left alone.

    pruned: number of cache groups that are pruned; all_groups: of all groups
    """
    if pruned < all_groups and options.layers_per_group > 1:
        raise UnsupportedModeError(
            f"layers_per_group={options.layers_per_group} needs a model with full attention in all "
            "layers: use layers_per_group=1"
        )


def check_modes(vllm_config: Any, options: Options) -> None:
    """Raise UnsupportedModeError for modes in which pruning does not work.

    The message lists all of them at once, each with the option to change.
    """
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    layers = model.get_total_num_hidden_layers()
    context = parallel.decode_context_parallel_size * parallel.prefill_context_parallel_size
    refused = {
        "speculative decoding (leave out --speculative-config)": vllm_config.speculative_config,
        "pipeline parallelism (use tensor parallelism)": parallel.pipeline_parallel_size > 1,
        "context parallelism (use tensor parallelism)": context > 1,
        f"a {cache.cache_dtype} KV cache (leave out --kv-cache-dtype)": (
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch."))
        ),
        "the role kv_consumer (use kv_producer)": (
            vllm_config.kv_transfer_config.kv_role == "kv_consumer"
        ),
        "data parallelism (start several servers)": parallel.data_parallel_size > 1,
        "dual batch overlap (leave out --enable-dbo and --ubatch-size)": parallel.use_ubatching,
        "--disable-hybrid-kv-cache-manager (leave it out)": (
            scheduler.disable_hybrid_kv_cache_manager
        ),
        "vLLM's own video pruning (leave out --video-pruning-rate)": (
            model.multimodal_config and model.multimodal_config.video_pruning_rate
        ),
        "full_graphs and cudagraph_mode FULL, which records prompts too (use FULL_AND_PIECEWISE)": (
            options.full_graphs and graphs.mixed_mode().name == "FULL"
        ),
        "pooling, which does not decode": model.runner_type != "generate",
        f"layers_per_group={options.layers_per_group} (use a divisor of {layers} layers)": (
            layers % options.layers_per_group
        ),
    }
    found = [what for what, holds in refused.items() if holds]
    if found:
        raise UnsupportedModeError(f"{CONNECTOR} does not work with {', '.join(found)}")
