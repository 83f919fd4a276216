"""The device of the gpu tests, and what a CPU does in its place in a dry run."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
Size = TypeVar("Size")
aten = torch.ops.aten
# Operators for which the host waits for the device, because it needs their numbers.
WAITING = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)


def real(size: Size, tiny: Size) -> Size:
    """A size on the GPU, or the one of a dry run."""
    return size if ON_GPU else tiny


class Waiting(TorchDispatchMode):
    """Refuses operators for which a host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITING, f"the host waits for {func}"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, a host that waits for the device is an error."""
    if not ON_GPU:
        with Waiting():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def allocated() -> int:
    """Bytes of all tensors of the device that are alive."""
    gc.collect()
    if ON_GPU:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    storages = (x.untyped_storage() for x in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def replayed(step: Callable[[], Any]) -> Callable[[], Any]:
    """A function that replays a CUDA graph of a step, which is warmed up first."""
    if not ON_GPU:
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def error(out: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is wanted, in float32."""
    out, wanted = out.float(), wanted.float()
    return float((out - wanted).norm() / wanted.norm().clamp(min=1e-9))
