"""The order of scoring, copies and attention in a step of the home "host", on a CPU stand-in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from test_recall_homes import SCALE, parked, query
from torch.utils._python_dispatch import TorchDispatchMode

import plphp
from plphp.recall import host, lanes
from plphp.recall.lanes import InOrder, in_parts

WRITES = (torch.ops.aten.index_copy_.default, torch.ops.aten.index_put_.default)


class Written(TorchDispatchMode):
    """Notes every write by index, such as fetched tokens that are put into slots."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WRITES:
            self.seen.append("write")
        return func(*args, **(kwargs or {}))


class Noting:
    """A lane of three parts that notes what is asked of it, in the interface of a side stream."""

    parts = 3

    def __init__(self, seen: list[str]) -> None:
        self.seen, self.marks = seen, 0

    def mark(self) -> int:
        self.seen.append(f"mark {self.marks}")
        self.marks += 1
        return self.marks - 1

    @contextmanager
    def copies(self, mark: int) -> Iterator[None]:
        self.seen.append(f"copies after {mark}")
        with Written(self.seen):
            yield
        self.seen.append(f"end of {mark}")

    def join(self) -> None:
        self.seen.append("join")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens in a step of two lines and more, in the order in which it is launched."""
    noted: list[str] = []
    attention = host.decode_attention

    def attend(*args: Any) -> Any:
        noted.append("attention")
        return attention(*args)

    monkeypatch.setattr(host, "decode_attention", attend)
    monkeypatch.setattr(host, "lane_of", lambda device: Noting(noted))
    return noted


def test_all_scores_come_before_the_first_copy_and_the_join_before_attention(
    seen: list[str],
) -> None:
    store, home, *_ = parked(plphp.Recall(budget=0.3))  # 2 rows of 2 KV heads: two parts of two
    home.attend(query(0), store, SCALE, None)
    assert [event for event in seen if event != "write"] == [
        "mark 0", "mark 1", "copies after 0", "end of 0", "copies after 1", "end of 1", "join",
        "attention",
    ]  # fmt: skip


def test_every_write_to_the_store_is_in_the_lane(seen: list[str]) -> None:
    store, home, *_ = parked(plphp.Recall(budget=0.3))
    with Written(seen):  # sees the writes outside of the lane as well, once more than inside
        home.attend(query(0), store, SCALE, None)
    inside, depth = 0, 0
    for event in seen:
        depth += event.startswith("copies after") - event.startswith("end of")
        assert event != "write" or depth == 1, "a slot is written outside of the lane"
        inside += event == "write"
    assert inside >= 2 * 2 * 2  # keys and values of two parts, seen twice


@pytest.mark.parametrize("window", [None, 50])
def test_parts_change_nothing(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens in the same slots, and the same output, whatever the parts."""
    found = []
    for parts in (1, 2, 3, 4):
        lane = InOrder()
        lane.parts = parts
        monkeypatch.setattr(host, "lane_of", lambda device, lane=lane: lane)
        store, home, *_ = parked(plphp.Recall(budget=0.3), window)
        out = [home.attend(query(step), store, SCALE, None) for step in range(3)]
        found.append((out, store.held(), home.held, home.fetched, home.vision_slots(store)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6)
    assert sum(found[0][3]) > 0


def test_parts_cover_all_lines_once() -> None:
    for lines in range(1, 12):
        for parts in range(1, 6):
            ranges = in_parts(lines, parts)
            assert [line for part in ranges for line in part] == [*range(lines)]
            assert len(ranges) <= parts


def test_a_device_without_streams_has_one_part() -> None:
    assert isinstance(lanes.lane_of(torch.device("cpu")), InOrder)
    assert lanes.lane_of(torch.device("cpu")).parts == 1
