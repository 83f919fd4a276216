"""The order of the requests in a batch, from the model runner, before attention metadata are built.

Changes in vLLM: the method of the model runner that prepares the inputs of a batch, because no
call of a connector gets the order of a batch before the metadata are built. Model Runner V2 calls
the connector only after that, so that a step begins here, too. Without PLPHPConnector the method
does what it did.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from plphp.vllm.worker import WorkerSide


def worker_side() -> WorkerSide | None:
    """The worker side of the connector in this process; None before vLLM has made it."""
    if not has_kv_transfer_group():
        return None
    side: WorkerSide | None = getattr(get_kv_transfer_group(), "worker", None)
    return side


def watch_batches(v2: bool) -> None:
    """Tell the worker side the requests of every batch. A second call does nothing.

    v2: whether the engine uses Model Runner V2
    """
    if v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2

        _wrap(RunnerV2, "prepare_inputs", lambda runner, batch: batch.req_ids)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

        _wrap(RunnerV1, "_prepare_inputs", lambda runner, batch: runner.input_batch.req_ids)


def _wrap(owner: Any, name: str, ids: Any) -> None:
    """Wrap a method. ids: function from the runner and the method's result to request ids."""
    original = getattr(owner, name)
    if hasattr(original, "plphp"):
        return

    @functools.wraps(original)
    def prepare(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, scheduler_output, *args, **kwargs)
        side = worker_side()
        if side is not None:
            side.begin(scheduler_output.kv_connector_metadata)
            side.place(ids(self, batch), scheduler_output.num_scheduled_tokens)
        return batch

    prepare.plphp = True  # type: ignore[attr-defined]
    setattr(owner, name, prepare)
