"""A pool of workers on Ray Data: each loads a model once and works off blocks of items.

Ray Data starts the workers (Ray actors), gives a block to a worker that is free, holds back blocks
while results are not fetched, and starts a worker that died again. What is added here: items keep
their numbers, so that nothing is lost or comes twice, and an item that kills its worker is found
and reported, in place of being tried for ever.
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

BLOCK = 8  # items that a worker takes at a time
MOST_BLOCKS = 10_000  # so many the driver keeps track of; a longer list gets larger blocks
RETRIES = 2  # of a block whose worker died; then its items are tried one by one, as often


@dataclass(frozen=True)
class Lost:
    """The result of an item whose worker died every time that the item was tried alone."""

    reason: str = (
        f"its worker process died {RETRIES + 1} times (killed for its memory?): use fewer or "
        "smaller images, or fewer --workers"
    )


@dataclass(frozen=True)
class Pool:
    """Where the workers are and what each of them gets.

    address: "local" starts Ray in this machine for the time of the work; else a running cluster:
        "auto", or HOST:PORT
    workers: models side by side; None is one for each GPU, or for each CPU core
    device: "cpu", or "cuda": each worker then has a GPU of its own
    Raises InputError if Ray is not installed, or for an address or device that cannot be shared.
    """

    address: str = "local"
    workers: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise InputError(
                f"--device {self.device} cannot be shared on Ray: give cpu, or cuda, where every "
                "worker has one GPU"
            )
        if "://" in self.address:
            raise InputError(
                f"--ray {self.address}: Ray Data needs its driver inside the cluster: run the "
                "command there, with `ray job submit -- plphp ... --ray auto`"
            )
        import_ray()


def blocks_of(count: int, size: int = BLOCK) -> int:
    """The number of blocks for `count` items: of `size` items, or larger where they are many."""
    return min(MOST_BLOCKS, -(-count // size)) if count else 0


def share(
    pool: Pool,
    make: Callable[[], Callable[[Item], Result]],
    items: Sequence[Item],
    size: int = BLOCK,
) -> Iterator[list[tuple[int, Result | Lost]]]:
    """Work off the items, some at a time: their indexes and results, in any order, each once.

    make: called once in every worker, where it loads the model; returns what answers an item. It is
        sent there, so what it needs must be importable or picklable
    size: items of a block, which one worker works off and which is done again if that worker dies

    A result is Lost if the item killed its worker whenever it was tried. Raises InputError for an
    exception in a worker, since that is no item's own: the model cannot be loaded, for example.
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
    """The results of one pass through Ray Data. Blocks whose worker died too often are left out."""
    ray = import_ray()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the command has a bar of its own
    context.max_errored_blocks = -1
    context.execution_options.preserve_order = False
    rows = [{"item": pickle.dumps(pair)} for pair in items.items()]
    workers = min(pool.workers or _capacity(ray, pool.device), blocks_of(len(rows), size))
    with warnings.catch_warnings():
        # Ray deprecates options without a name of their own, and gives none to this one.
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
    """The workers that fit into the cluster as it is now."""
    have = int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 0))
    if not have:
        raise InputError(f"the Ray cluster has no free {device} device: give another --device")
    return have


@dataclass(frozen=True)
class Failure:
    """An exception in a worker that is no item's own."""

    reason: str


class Worker:
    """What Ray Data runs in each actor: (index, item) rows in, (index, result) rows out."""

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
    """Go to the folder of the command: names of files are as seen from there."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise InputError(
            f"a worker on {os.uname().nodename} has no {folder} ({error.strerror}): every machine "
            "of the cluster must see the same files under the same names"
        ) from error


def _said(error: Exception) -> str:
    message = " ".join(str(error).split())
    return message if isinstance(error, PlphpError) else f"{type(error).__name__}: {message}"
