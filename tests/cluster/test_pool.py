"""The pool: every item once, whatever happens to a worker, and errors where they belong."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from killing import once

from plphp.cluster import Lost, Pool, share
from plphp.errors import InputError

pytestmark = [
    pytest.mark.usefixtures("two_cores"),
    pytest.mark.filterwarnings("default"),  # Ray's own
]


def work(items: Sequence[Any], make: Callable[[], Any], workers: int = 2) -> dict[int, Any]:
    """The result of every item by its index; none comes twice."""
    found: dict[int, Any] = {}
    for some in share(Pool(workers=workers), make, items):
        for index, result in some:
            assert index not in found, "an item has two results"
            found[index] = result
    return found


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_every_item_once_by_several_workers(tmp_path: Path) -> None:
    (tmp_path / "meet").mkdir()

    def make() -> Callable[[str], tuple[str, int]]:
        meeting = tmp_path / "meet"
        (meeting / str(os.getpid())).touch()
        while len(list(meeting.iterdir())) < 2:  # both are there before either begins
            pass
        return lambda text: (text.upper(), os.getpid())

    found = work([f"item {k}" for k in range(100)], make)
    assert {k: text for k, (text, _) in found.items()} == {k: f"ITEM {k}" for k in range(100)}
    assert len({process for _, process in found.values()}) == 2
    assert os.getpid() not in {process for _, process in found.values()}


def test_nothing_to_do_starts_nothing() -> None:
    assert work([], die) == {}


def test_a_worker_that_is_killed_twice_costs_no_item(tmp_path: Path) -> None:
    def make() -> Callable[[int], int]:
        def double(item: int) -> int:
            if (item == 20 and once(tmp_path / "a")) or (item == 60 and once(tmp_path / "b")):
                die()
            return 2 * item

        return double

    assert work(range(100), make) == {k: 2 * k for k in range(100)}
    assert (tmp_path / "a").exists() and (tmp_path / "b").exists()


def test_an_item_that_kills_its_worker_is_lost_alone(tmp_path: Path) -> None:
    """As an item does whose images need more memory than the machine has."""

    def make() -> Callable[[int], int]:
        return lambda item: die() or item if item == 13 else item

    found = work(range(40), make)
    assert isinstance(found.pop(13), Lost)
    assert found == {k: k for k in range(40) if k != 13}


def test_a_model_that_cannot_be_loaded_ends_the_work_with_one_line() -> None:
    def make() -> Any:
        raise InputError("no such model:\n give another")

    with pytest.raises(InputError, match=r"^no such model: give another$"):
        work(range(4), make)


def test_an_exception_that_is_no_items_own_ends_the_work() -> None:
    def make() -> Callable[[int], int]:
        return lambda item: 1 // item

    with pytest.raises(InputError, match="ZeroDivisionError"):
        work([1, 0], make)


def test_workers_begin_in_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert work([0], lambda: lambda item: os.getcwd()) == {0: str(tmp_path)}


def test_more_workers_than_the_cluster_has_cores_do_not_hang() -> None:
    assert work(range(50), lambda: lambda item: item, workers=5) == {k: k for k in range(50)}


def test_results_that_are_not_fetched_hold_the_workers_back(tmp_path: Path) -> None:
    """Backpressure: what is done ahead of the reader is limited by the object store."""
    log = tmp_path / "log"
    log.touch()

    def make() -> Callable[[int], bytes]:
        def large(item: int) -> bytes:
            with log.open("ab") as file:
                file.write(b".")
            return bytes(8_000_000)

        return large

    stream = share(Pool(workers=2), make, range(100), 1)
    next(stream)
    before = -1
    while log.stat().st_size != before:
        before = log.stat().st_size
        time.sleep(3)
    assert before < 60, "800 MB of results do not fit into a store of 200 MB"
    assert 1 + sum(len(some) for some in stream) == 100
