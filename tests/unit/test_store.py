"""The buffers of one layer: append, compact, hide, against plain concatenation."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.cache import KVStore, StaticStore, allocated
from plphp.policy import KeepPlan
from plphp.policy.view import pack

NAN = torch.full((2,), float("nan"))


def plan(keep: torch.Tensor) -> KeepPlan:
    return pack(keep, NAN, NAN.double(), torch.full((2,), -1))


def filled(length: int, window: int | None = None) -> tuple[KVStore, torch.Tensor, torch.Tensor]:
    keys, values = torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 5)
    return KVStore(keys, values, window), keys, values


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.lists(st.integers(1, 9), max_size=12))
def test_append_equals_concatenation(length: int, steps: list[int]) -> None:
    store, keys, values = filled(length)
    for step in steps:
        more_k, more_v = torch.randn(2, 3, step, 4), torch.randn(2, 3, step, 5)
        store.append(more_k, more_v)
        keys, values = torch.cat([keys, more_k], 2), torch.cat([values, more_v], 2)
    held_k, held_v = store.held()
    assert torch.equal(held_k, keys)
    assert torch.equal(held_v, values)
    assert store.logical == keys.shape[2]


def test_growth_is_amortised_and_waste_bounded() -> None:
    store, _, _ = filled(1000)
    moved, capacity = 0, store.keys.shape[2]
    for _ in range(1000):
        store.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 5))
        if store.keys.shape[2] != capacity:
            moved, capacity = moved + store.end, store.keys.shape[2]
        assert store.keys.shape[2] <= store.end + max(16, store.end // 16) + 1
    assert moved < 25 * 1000  # stock concatenation moves 1000 * 1500


def test_compact_keeps_the_plan_and_frees_the_rest() -> None:
    store, keys, values = filled(40)
    keep = torch.zeros(2, 3, 40, dtype=torch.bool)
    for head in range(3):
        keep[0, head, torch.randperm(40)[:11]] = True
        keep[1, head, torch.randperm(40)[:7]] = True
    old = allocated([keys, values])
    store.compact(plan(keep))
    held_k, held_v = store.held()
    assert store.end == 11
    assert store.start.tolist() == [0, 4]
    assert store.ragged
    for row in range(2):
        for head in range(3):
            start = int(store.start[row])
            assert torch.equal(held_k[row, head, start:], keys[row, head, keep[row, head]])
            assert torch.equal(held_v[row, head, start:], values[row, head, keep[row, head]])
    assert allocated([store.keys, store.values]) == old // 40 * (11 + 14)  # half of the 29 dropped
    assert store.keys.untyped_storage().data_ptr() != keys.untyped_storage().data_ptr()


def test_reserve_makes_room_at_once() -> None:
    store, _, _ = filled(20)
    store.compact(plan(torch.ones(2, 3, 20, dtype=torch.bool)), reserve=5)
    address = store.keys.data_ptr()
    for _ in range(5):
        store.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 5))
    assert store.keys.data_ptr() == address


def test_visible_hides_fillers_future_and_what_left_the_window() -> None:
    store, _, _ = filled(10, window=12)
    keep = torch.zeros(2, 3, 10, dtype=torch.bool)
    keep[0, :, [0, 4, 9]] = True
    keep[1, :, [5, 9]] = True
    store.compact(plan(keep))
    store.append(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 5))
    wanted = torch.tensor([[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]])
    assert torch.equal(store.visible(2)[:, 0].int(), wanted.int())
    store.append(torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 5))
    # The query is column 12. A window of 12 covers columns 1 to 12, so column 0 is outside.
    visible = store.visible(1).expand(2, 3, 1, 6)[:, 0, 0].int()
    assert visible.tolist() == [[0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_equal_rows_need_no_mask() -> None:
    store, _, _ = filled(10)
    store.compact(plan(torch.ones(2, 3, 10, dtype=torch.bool)))
    assert store.visible(1) is None


def test_reorder_moves_rows_and_crop_forgets_the_end() -> None:
    store, keys, _ = filled(6)
    keep = torch.ones(2, 3, 6, dtype=torch.bool)
    keep[1, :, :2] = False
    store.compact(plan(keep))
    store.reorder(torch.tensor([1, 1, 0]))
    assert store.start.tolist() == [2, 2, 0]
    assert torch.equal(store.held()[0][2], keys[0])
    store.crop(2)
    assert store.end == store.logical == 4
    assert torch.equal(store.held()[0][2], keys[0, :, :4])


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.lists(st.integers(1, 5), max_size=6), st.sampled_from([None, 24]))
def test_a_frozen_store_is_the_same_store(
    length: int, steps: list[int], window: int | None
) -> None:
    """Append, mask and thaw with lengths on the device, against lengths on the host."""
    store, _, _ = filled(length, window)
    keep = torch.rand(2, 3, length) > 0.4
    keep[0] = keep[0, :1]  # every head keeps equally many
    keep[1] = keep[1, :1]
    keep[..., -1] = True
    store.compact(plan(keep), reserve=40)
    other = KVStore(store.keys.clone(), store.values.clone())
    other.window, other.start, other.ragged = store.window, store.start, store.ragged
    other.end, other.logical = store.end, store.logical
    other.columns = None if store.columns is None else store.columns.clone()
    frozen = StaticStore(other)
    for step in steps:
        keys, values = torch.randn(2, 3, step, 4), torch.randn(2, 3, step, 5)
        store.append(keys, values)
        frozen.append(keys, values)
        wanted = store.visible(step)
        got = frozen.visible(step)
        assert not got[..., store.end :].any()
        wanted = torch.ones(1, 1, 1, 1, dtype=torch.bool) if wanted is None else wanted
        shape = (2, 3, step, store.end)
        assert torch.equal(got[..., : store.end].expand(shape), wanted.expand(shape))
    thawed = frozen.thaw()
    assert (thawed.end, thawed.logical, thawed.ragged) == (store.end, store.logical, store.ragged)
    for a, b in zip(thawed.held(), store.held(), strict=True):
        assert torch.equal(a, b)
