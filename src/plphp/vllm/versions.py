"""The minor versions of vLLM that the plugin works with, and what it uses of each.

vLLM keeps only its connector interface stable. `USES` lists everything else that the plugin calls,
wraps or subclasses, with the arguments or fields that it relies on. For a minor version that is not
in `TESTED`, `python -m plphp.vllm.versions` prints which of them have changed, as the first step of
"Versions of vLLM" in docs/vllm-models.md.

0.32 and 0.33 need the same code. Their differences that are near the plugin:
- 0.33 leaves the null blocks at the head of a table out of what `pop_blocks_for_free` returns, and
  out of the block ids for workers. The plugin frees no null block, and reads ids before pruning.
- A spec of 0.33 says whether a draft model owns its layer (`is_draft`). `attach` copies all fields
  of a spec, and speculative decoding is refused.
- Model Runner V2 of 0.33 drops the pixels of images that it has encoded, and sends them again when
  they are needed. The plugin leaves the pixels with new requests, so that it drops fewer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from plphp.errors import UnsupportedVllmError

TESTED = ("0.32", "0.33")  # minor versions, the oldest first


@dataclass(frozen=True)
class Use:
    """Something of vLLM that the plugin relies on.

    module, name: where it is; the name may contain dots
    takes: parameters of a function, or annotated fields of a class, that must exist
    """

    module: str
    name: str
    takes: tuple[str, ...] = ()

    def missing(self) -> str | None:
        """What this vLLM does not have of it, None if it has everything."""
        try:
            found = resolve_name(f"vllm.{self.module}:{self.name}")
        except (ImportError, AttributeError):
            return f"{self.module} has no {self.name}"
        gone = [name for name in self.takes if name not in _names(found)]
        return f"{self.module}: {self.name} has no {', '.join(gone)}" if gone else None


def _names(found: Any) -> set[str]:
    """The fields of a class, those of its bases included, or the parameters of a function."""
    if isinstance(found, type):
        return {name for base in found.__mro__ for name in vars(base).get("__annotations__", ())}
    return set(inspect.signature(found).parameters)


_MANAGER = "v1.core.single_type_kv_cache_manager"
_COORDINATOR = "v1.core.kv_cache_coordinator"
_CONNECTOR = "distributed.kv_transfer.kv_connector"
USES = (
    # plugin, connector, metrics
    Use(f"{_CONNECTOR}.factory", "KVConnectorFactory._registry"),
    Use(f"{_CONNECTOR}.factory", "KVConnectorFactory.get_connector_class"),
    Use(f"{_CONNECTOR}.v1.base", "KVConnectorBase_V1.requires_piecewise_for_cudagraph"),
    Use(f"{_CONNECTOR}.v1.base", "KVConnectorBase_V1.on_new_request", ("request",)),
    Use(f"{_CONNECTOR}.v1.base", "KVConnectorBase_V1.bind_kv_cache_manager", ("kv_cache_manager",)),
    Use(f"{_CONNECTOR}.v1.base", "KVConnectorBase_V1.handle_preemptions"),
    Use(f"{_CONNECTOR}.v1.base", "KVConnectorBase_V1.build_connector_worker_meta"),
    Use(f"{_CONNECTOR}.v1.base", "SupportsHMA.request_finished_all_groups"),
    Use(f"{_CONNECTOR}.v1.metrics", "KVConnectorPromMetrics"),
    Use(
        "model_executor.layers.attention.attention",
        "Attention.get_kv_cache_spec",
        ("self", "vllm_config"),
    ),
    # attach, layout, worker
    Use("model_executor.models.utils", "extract_layer_index", ("layer_name",)),
    Use("v1.attention.backend", "AttentionBackend.get_builder_cls"),
    Use(
        "v1.attention.backend",
        "AttentionMetadataBuilder.build",
        ("common_prefix_len", "common_attn_metadata", "fast_build"),
    ),
    Use(
        "v1.attention.backend",
        "CommonAttentionMetadata",
        ("seq_lens", "max_seq_len", "block_table_tensor", "seq_lens_cpu_upper_bound"),
    ),
    Use("v1.attention.backend", "CommonAttentionMetadata.replace"),
    # runner
    Use("v1.worker.gpu_model_runner", "GPUModelRunner._prepare_inputs", ("scheduler_output",)),
    Use("v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", ("scheduler_output",)),
    # blocks
    Use("v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered"),
    Use("v1.kv_cache_spec_registry", "KVCacheSpecRegistry.register"),
    Use("v1.kv_cache_interface", "FullAttentionSpec.merge", ("specs",)),
    Use("v1.kv_cache_interface", "FullAttentionSpec.is_uniform_with_collection"),
    Use("v1.kv_cache_interface", "FullAttentionSpec", ("head_size", "head_size_v", "dtype")),
    Use(
        _MANAGER,
        "FullAttentionManager.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "new_computed_blocks"),
    ),
    Use(
        _MANAGER,
        "FullAttentionManager.allocate_new_blocks",
        ("request_id", "num_tokens", "num_tokens_main_model"),
    ),
    Use(_MANAGER, "FullAttentionManager.cache_blocks", ("request", "num_tokens")),
    Use(_MANAGER, "FullAttentionManager.pop_blocks_for_free", ("request_id",)),
    Use(
        _COORDINATOR,
        "KVCacheCoordinator.get_num_blocks_to_allocate",
        ("request_id", "num_tokens", "new_computed_blocks"),
    ),
    Use(_COORDINATOR, "KVCacheCoordinator.allocate_new_blocks", ("request_id", "num_tokens")),
    Use(
        _COORDINATOR,
        "KVCacheCoordinator.find_longest_cache_hit",
        ("block_hashes", "max_cache_hit_length"),
    ),
    Use(_COORDINATOR, "KVCacheCoordinator.cache_blocks", ("request", "num_computed_tokens")),
    Use(_COORDINATOR, "KVCacheCoordinator.free", ("request_id",)),
    Use(_COORDINATOR, "KVCacheCoordinator.pop_blocks_for_free", ("request_id",)),
    Use(_COORDINATOR, "KVCacheCoordinator.remove_skipped_blocks"),
    # scheduler
    Use("v1.request", "Request.__init__", ("mm_features", "sampling_params", "resumable")),
    Use(
        "v1.core.sched.output",
        "SchedulerOutput",
        ("num_scheduled_tokens", "scheduled_new_reqs", "scheduled_cached_reqs"),
    ),
    Use("v1.core.sched.output", "SchedulerOutput", ("finished_req_ids", "preempted_req_ids")),
    Use("v1.core.sched.output", "NewRequestData", ("req_id", "mm_features", "num_computed_tokens")),
    Use("v1.core.sched.output", "CachedRequestData", ("req_ids", "num_computed_tokens")),
)


def check_version(found: str) -> None:
    """Raise UnsupportedVllmError for a minor version of vLLM that was not tested."""
    if ".".join(found.split(".")[:2]) not in TESTED:
        raise UnsupportedVllmError(
            f"plphp prunes in vLLM {' and '.join(TESTED)}, found {found}: "
            f"pip install 'vllm=={TESTED[-1]}.*'"
        )


def changed() -> list[str]:
    """What the installed vLLM does not have of what the plugin uses, one line each."""
    return [line for line in (use.missing() for use in USES) if line]


if __name__ == "__main__":
    import vllm

    lines = changed()
    print(f"vLLM {vllm.__version__}: {len(USES) - len(lines)} of {len(USES)} uses are unchanged")
    print("\n".join(lines))
    raise SystemExit(bool(lines))
