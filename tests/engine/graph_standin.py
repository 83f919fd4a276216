"""Full CUDA graphs of decoding steps, imitated on a CPU for Model Runner V1.

What a graph knows of a step is where its inputs were when it was recorded. So the attention
metadata of a recording are stored by the size of the batch, and a decoding step runs with these
instead of its own. A graph calls no Python code either: of what the plugin does after attention,
only the copy of the queries happens, which a graph would have recorded.
"""

from __future__ import annotations

import contextlib
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
    from vllm.config import CUDAGraphMode
    from vllm.forward_context import BatchDescriptor
    from vllm.v1.attention.backends import flash_attn
    from vllm.v1.worker import gpu_model_runner

    runner = gpu_model_runner.GPUModelRunner
    decide, enter = (
        runner._determine_batch_execution_and_padding,
        gpu_model_runner.set_forward_context,
    )
    flash_attn.get_flash_attn_version = lambda *args, **kwargs: (
        2
    )  # FA3's plan would be recorded too

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
    without_python()


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
    from vllm.config import CUDAGraphMode

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    runner = getattr(worker, "worker", worker).model_runner
    now["recording"], standins.strict = True, False
    for size in SIZES:
        runner._dummy_run(
            size,
            cudagraph_runtime_mode=CUDAGraphMode.FULL,
            uniform_decode=True,
            is_graph_capturing=True,
        )
    now["recording"], standins.strict = False, True
