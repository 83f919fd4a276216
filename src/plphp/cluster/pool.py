"""A pool of workers on Ray Data. Each worker loads a model once and processes blocks of items.

Ray Data starts the workers (Ray actors), gives blocks to free workers, holds blocks back while
results are not fetched, and restarts a worker that died. This module adds two things. Items keep
their numbers, so that each has exactly one result. An item that kills its worker is found and
reported instead of being tried for ever.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from plphp.cluster.connection import connected, import_ray
from plphp.errors import InputError, PlphpError

Item = TypeVar("Item")
Result = TypeVar("Result")

BLOCK = 8  # the number of items that a worker takes at a time
MOST_BLOCKS = 10_000  # the most blocks that Ray's driver handles; a longer list gets larger blocks
RETRIES = 2  # retries of a block whose worker died, and then of each of its items alone


@dataclass(frozen=True)
class Lost:
    """The result of an item whose worker died every time that the item was tried alone."""

    reason: str = (
        f"its worker process died {RETRIES + 1} times (killed for its memory?): use fewer or "
        "smaller images, or fewer --workers"
    )


@dataclass(frozen=True)
class Pool:
    """The place and the number of the workers.

    address: "local" starts Ray on this machine for the duration of the work; "auto" or HOST:PORT is
        a running cluster
    workers: number of models; None is one for each GPU, or for each CPU core
    device: "cpu", or "cuda", where each worker has its own GPU

    Raises InputError if Ray is not installed, or for an address or a device that cannot be shared.
    """

    address: str = "local"
    workers: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise InputError(
                f"--device {self.device} cannot be used with --ray: give cpu, or cuda, where each "
                "worker has one GPU"
            )
        if "://" in self.address:
            raise InputError(
                f"--ray {self.address}: Ray Data must be started inside the cluster: run `ray job "
                "submit -- plphp ... --ray auto`"
            )
        import_ray()


def blocks_of(count: int, size: int = BLOCK) -> int:
    """The number of blocks for `count` items. Blocks have `size` items, or more for long lists."""
    return min(MOST_BLOCKS, -(-count // size)) if count else 0


def share(
    pool: Pool,
    make: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    size: int = BLOCK,
) -> Iterator[list[tuple[int, Result | Lost]]]:
    """Process the items on the workers. Yields lists of (index of the item, result) in any order.

    make: is called once in each worker, loads the model there, and returns a function that answers
        one item. It is sent to the workers, so that what it needs must be importable or picklable
    size: items of a block. A block is processed by one worker, and again if that worker dies

    A result is Lost if the item killed its worker each time that it was tried. Raises InputError
    for an exception in a worker, such as for a model that cannot be loaded.
    """
    left = dict(enumerate(items))
    if not left:
        return
    with connected(pool.address, pool.workers):
        for round_size in (size, 1):
            for some in _stream(pool, make, left, round_size):
                new = [(index, result) for index, result in some if index in left]
                for index, _ in new:
                    del left[index]
                yield new
            if not left:
                return
    yield [(index, Lost()) for index in left]


def _stream(
    pool: Pool, make: Any, items: dict[int, Any], size: int
) -> Iterator[list[tuple[int, Any]]]:
    """The results of one pass through Ray Data, without blocks whose worker died too often."""
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command shows its own progress bar
    context.max_errored_blocks = -1
    context.execution_options.preserve_order = False
    rows = [{"item": pickle.dumps(pair)} for pair in items.items()]
    workers = min(pool.workers or _capacity(ray, pool.device), blocks_of(len(rows), size))
    with warnings.catch_warnings():
        # Ray warns that an option is deprecated, but has no other option for this.
        warnings.simplefilter("ignore")
        shared = ray.data.from_items(rows, override_num_blocks=blocks_of(len(rows), size))
        results = shared.map_batches(
            Worker,
            fn_constructor_args=(ray.cloudpickle.dumps(make), os.getcwd()),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(
                size=workers, max_tasks_in_flight_per_actor=2 if size > 1 else 1
            ),
            num_cpus=1,
            num_gpus=1 if pool.device == "cuda" else 0,
            max_restarts=-1,
            max_task_retries=RETRIES,
        )
        for block in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            found = [pickle.loads(row.as_py()) for row in block.column("result")]
            for result in found:
                if isinstance(result, Failure):
                    raise InputError(result.reason)
            yield found


def _capacity(ray: Any, device: str) -> int:
    """The number of workers that the cluster has devices for."""
    have = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))
    if not have:
        raise InputError(f"the Ray cluster has no free {device} device: give another --device")
    return have


@dataclass(frozen=True)
class Failure:
    """An exception in a worker that is not caused by an item."""

    reason: str


class Worker:
    """The class that Ray Data runs in each actor. It turns (index, item) into (index, result)."""

    def __init__(self, make: bytes, folder: str) -> None:
        self.failure: Failure | None = None
        try:
            _enter(folder)
            self.work = pickle.loads(make)()
        except Exception as error:
            self.failure = Failure(_said(error))

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"result": [pickle.dumps(self._result(row)) for row in batch["item"]]}

    def _result(self, row: bytes) -> tuple[int, Any] | Failure:
        if self.failure is not None:
            return self.failure
        index, item = pickle.loads(row)
        try:
            return index, self.work(item)
        except Exception as error:
            return Failure(_said(error))


def _enter(folder: str) -> None:
    """Change to the directory of the command, because names of files are relative to it."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"a worker on {os.uname().nodename} has no directory {folder} ({error.strerror}): each "
            "machine of the cluster must have the same files under the same names"
        ) from error


def _said(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, PlphpError) else f"{type(error).__name__}: {message}"
