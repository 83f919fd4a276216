"""PLPHPConnector: the class that vLLM calls, in the scheduler and next to every model runner.

A KV connector is vLLM's public channel between the two. This one transfers no keys or values.
"""

from __future__ import annotations

from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from plphp.errors import UnsupportedModeError
from plphp.paged.fixed import FixedTensors, query_buffers
from plphp.vllm import blocks, checks
from plphp.vllm.attach import SIDE, check_sharing
from plphp.vllm.layer import Layer
from plphp.vllm.layout import reader_of
from plphp.vllm.messages import Pruned, Step
from plphp.vllm.metrics import Counts, Prometheus
from plphp.vllm.options import read_options
from plphp.vllm.runner import watch_batches
from plphp.vllm.scheduler import SchedulerSide
from plphp.vllm.versions import check_version
from plphp.vllm.worker import WorkerSide

check_version(vllm.__version__)
logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers under its own name


class PLPHPConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's interface to plphp. `SchedulerSide` and `WorkerSide` do the work.

    Raises UnsupportedModelError, UnsupportedModeError, and ValueError for wrong options.
    """

    requires_kv_delivery = False  # nothing is transferred, so blocks are free when a request ends

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether attention runs between the pieces of CUDA graphs, with tables of any address.

        extra_config: as the user gave it
        """
        return not read_options(extra_config).full_graphs

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.options = options = read_options(
            vllm_config.kv_transfer_config.kv_connector_extra_config
        )
        checks.check_modes(vllm_config, options)
        blocks.register()
        self.groups = blocks.prunable(kv_cache_config.kv_cache_groups)
        checks.check_groups(len(self.groups), len(kv_cache_config.kv_cache_groups), options)
        layers = vllm_config.compilation_config.static_forward_context  # of this process
        check_sharing({name for group in self.groups for name in group.layer_names}, layers)
        self.block_size: int = self.groups[0].kv_cache_spec.block_size
        self.worker: WorkerSide | None = None
        self.scheduler: SchedulerSide | None = None
        if role is KVConnectorRole.WORKER:
            watch_batches(vllm_config.use_v2_model_runner)
        if role is KVConnectorRole.SCHEDULER:
            share = options.share_prefix and vllm_config.cache_config.enable_prefix_caching
            self.scheduler = SchedulerSide(options, self.block_size, share)
            logger.info("pruning images with %s", options.served(self.block_size))
            logger.warning(checks.measured(current_platform.device_type))

    # Called in the scheduler's process

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind(kv_cache_manager.coordinator.single_type_managers)
        kv_cache_manager.coordinator = blocks.LockstepCoordinator(
            kv_cache_manager.coordinator,
            freed=self._scheduler.plan_blocks,
            window=self._scheduler.options.policy.window,
        )

    def on_new_request(self, request: Any) -> None:
        self._scheduler.add(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._scheduler.step(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        pruned = connector_output.kv_connector_worker_meta
        if isinstance(pruned, Pruned):
            self._scheduler.pruned(pruned)

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request.request_id)

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, self._scheduler.finish(request.request_id)

    @property
    def _scheduler(self) -> SchedulerSide:
        assert self.scheduler is not None
        return self.scheduler

    # Called next to a model runner

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        modules = self._vllm_config.compilation_config.static_forward_context
        layers = []
        for group, spec in enumerate(self.groups):
            for name in spec.layer_names:
                check_blocks(name, modules[name], self.block_size)
                index, reader = extract_layer_index(name), reader_of(modules[name])
                layers.append(Layer(name, group, index, modules[name], reader))
        device = next(iter(kv_caches.values())).device
        fixed = self._fixed(layers, device) if self.options.full_graphs else None
        depth = self._vllm_config.model_config.get_total_num_hidden_layers()
        self.worker = WorkerSide(layers, depth, self.block_size, mean_over_ranks, device, fixed)
        for layer in layers:
            setattr(layer.module, SIDE, self.worker)

    def _fixed(self, layers: list[Layer], device: torch.device) -> FixedTensors:
        rows = self._vllm_config.scheduler_config.max_num_seqs
        shapes = {one.name: (one.module.num_heads, one.module.head_size) for one in layers}
        dtype = self._vllm_config.model_config.dtype
        return FixedTensors(rows, query_buffers(shapes, rows, dtype, device))

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        """Begin a step. Model Runner V1 calls this first, V2 after it has built the metadata."""
        assert self.worker is not None and isinstance(kv_connector_metadata, Step)
        self.worker.begin(kv_connector_metadata)

    def wait_for_save(self) -> None:
        """End a step. vLLM calls this after the forward of the model."""
        assert self.worker is not None
        self.worker.finish()

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        assert self.worker is not None
        return self.worker.report()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    # Metrics

    def get_kv_connector_stats(self) -> Counts | None:
        return self.scheduler.counts.take() if self.scheduler else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> Counts:
        return Counts(data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> Prometheus:
        return Prometheus(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def check_blocks(name: str, module: Any, block_size: int) -> None:
    """Raise UnsupportedModeError for a layer whose backend splits the blocks of the manager."""
    split = module.kv_cache.shape[2]
    if split != block_size:
        raise UnsupportedModeError(
            f"{name} cannot be pruned in vLLM: its attention backend splits blocks of {block_size} "
            f"tokens into blocks of {split}: use --block-size {split}"
        )


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a tensor over the tensor-parallel ranks.

    All ranks hold equally many heads of every layer, so this is the mean over all heads.
    """
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return tensor
    mean: Tensor = tensor_model_parallel_all_reduce(tensor.clone()) / ranks
    return mean
