"""Full CUDA graphs of decoding steps, imitated on a CPU for both model runners.

What a graph knows of a step is where its inputs were when it was recorded. Model Runner V1: the
attention metadata of a recording are stored by the size of the batch, and a decoding step runs with
these instead of its own. Model Runner V2: its own graph manager decides, and the forward that it
records is called again with all tensors and numbers of the recording. A graph calls no Python code
either: of what the plugin does after attention, only the copy of the queries happens, which a graph
would have recorded.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import standins

SIZES = (1, 2, 4, 8)  # of batches that are recorded; others are padded
recorded: dict[int, tuple[Any, Any]] = {}
counts: Counter[str] = Counter()  # "replays", and "prompts that end in one"
now: dict[str, bool] = {"recording": False, "replaying": False}


def install() -> None:
    """Replace what decides about graphs in the model runner. Call this before an engine is made."""
    from vllm.v1.attention.backends import flash_attn

    # FA3's plan would be recorded too
    flash_attn.get_flash_attn_version = lambda *args, **kwargs: 2
    (install_v2 if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1" else install_v1)()
    without_python()


class Replay:
    """A recorded forward of Model Runner V2."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def replay(self) -> None:
        from vllm.config import CUDAGraphMode

        now["replaying"] = True
        try:
            self.forward(CUDAGraphMode.NONE)
        finally:
            now["replaying"] = False


def install_v2() -> None:
    """Let the graph manager of Model Runner V2 work with graphs of decoding steps on a CPU."""
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    manager = cudagraph_utils.CudaGraphManager

    class Manager(model_runner.ModelCudaGraphManager):
        def __init__(self, config: Any, device: Any, mode: Any, **given: Any) -> None:
            config.compilation_config.cudagraph_capture_sizes = list(SIZES)
            config.compilation_config.max_cudagraph_capture_size = max(SIZES)
            super().__init__(config, device, CUDAGraphMode.FULL_DECODE_ONLY, **given)

    def capture(self: Any, create_forward: Any, told: str = "") -> None:
        for step in self._capture_descs[CUDAGraphMode.FULL]:
            create_forward(step, warmup=True)(CUDAGraphMode.NONE)
            forward = create_forward(step, warmup=False)
            forward(CUDAGraphMode.NONE)
            self.graphs[step] = Replay(forward)
        self._graphs_captured = True

    model_runner.ModelCudaGraphManager = Manager
    manager.capture = capture
    type(current_platform).get_global_graph_pool = lambda platform: None


def install_v1() -> None:
    """Replace what decides about graphs in Model Runner V1."""
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.worker import gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    decide, enter = (
        runner._determine_batch_execution_and_padding,
        gpu_model_runner.set_forward_context,
    )

    def decided(self: Any, *args: Any, force_eager: bool = False, **given: Any) -> Any:
        mode, descriptor, *rest = decide(self, *args, force_eager=force_eager, **given)
        tokens, most = given["num_tokens"], given["max_num_scheduled_tokens"]
        if most == 1 and tokens <= max(SIZES) and (recorded or now["recording"]):
            size = min(size for size in SIZES if size >= tokens)
            descriptor = BatchDescriptor(num_tokens=size, num_reqs=size, uniform=True)
            mode = CUDAGraphMode.FULL
        return mode, descriptor, *rest

    @contextlib.contextmanager
    def entered(metadata: Any, config: Any, **given: Any) -> Iterator[None]:
        full = given.get("cudagraph_runtime_mode") == CUDAGraphMode.FULL
        if full:
            size = given["batch_descriptor"].num_tokens
            given["cudagraph_runtime_mode"] = CUDAGraphMode.NONE
            if now["recording"]:
                recorded[size] = metadata, given["slot_mapping"]
            else:
                metadata, given["slot_mapping"] = recorded[size]
                now["replaying"] = True
        try:
            with enter(metadata, config, **given):
                yield
        finally:
            now["replaying"] = False

    runner._determine_batch_execution_and_padding = decided
    gpu_model_runner.set_forward_context = entered


def without_python() -> None:
    """Let a replay call nothing of the plugin but the copy that a graph records."""
    from plphp.vllm.worker import WorkerSide

    after = WorkerSide.after_attention

    def hooked(self: Any, name: str, query: Any, output: Any) -> None:
        if not now["replaying"]:
            after(self, name, query, output)
            return
        self.fixed.keep(name, query)
        if name == next(iter(self.layers)):
            counts["replays"] += 1
            counts["prompts that end in one"] += len(self.endings)

    WorkerSide.after_attention = hooked


def record(llm: Any) -> None:
    """Record a graph of each size."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    now["recording"], standins.strict = True, False
    if llm.llm_engine.vllm_config.use_v2_model_runner:
        record_v2(runner)
    else:
        record_v1(runner)
    now["recording"], standins.strict = False, True


def record_v1(runner: Any) -> None:
    from vllm.config import CUDAGraphMode

    for size in SIZES:
        runner._dummy_run(
            size,
            cudagraph_runtime_mode=CUDAGraphMode.FULL,
            uniform_decode=True,
            is_graph_capturing=True,
        )


def record_v2(runner: Any) -> None:
    """As `capture_model` of the runner, without its measurements of a GPU's memory."""
    runner.cudagraph_manager.capture(
        runner.model,
        runner.model_state,
        runner.input_buffers,
        runner.intermediate_tensors,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )
