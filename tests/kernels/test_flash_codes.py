"""The kernel that reads codes against the float32 reference: in Triton's interpreter, on a GPU."""

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import plphp
from plphp.attention import choose, reference
from plphp.cache import KVStore
from plphp.policy import Look
from plphp.recall import QuantisedHome, codes, park

pytest.importorskip("triton", reason="Triton is not to be had for this platform")
from plphp.attention import flash_codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A number made of a code may be rounded to bfloat16's other neighbour than in the reference.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
SIZES = [(32, 32), (64, 64), (72, 72), (128, 128), (112, 64), (256, 256)]


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out.float().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-9))


def check(
    seed: int,
    lengths: list[int],
    parked: list[int],
    kv: int,
    groups: int,
    queries: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    options: set[str] | frozenset[str] = frozenset(),
) -> None:
    """Rows of unequal length, in full and in codes; slots that no row owns hold NaN."""
    torch.manual_seed(seed)
    rows, tokens = len(lengths), max(parked)
    end = max(lengths) + queries - 1
    k, v = (torch.randn(rows, kv, end + 5, size).to(dtype) for size in sizes)
    starts = torch.tensor([max(lengths) - length for length in lengths])
    q = torch.randn(rows, queries, kv * groups, sizes[0]).to(dtype).transpose(1, 2)
    keys = codes.keys_to_codes(torch.randn(rows, kv, tokens, sizes[0]), bits)
    values = codes.values_to_codes(torch.randn(rows, kv, tokens, sizes[1]) + 1, bits)

    slots, asking = torch.arange(end), torch.arange(end - queries, end)[:, None]
    own = (slots >= starts[:, None, None]) & (slots <= asking)
    valid = torch.arange(tokens) < torch.tensor(parked)[:, None]
    visible = torch.cat([own, valid[:, None].expand(-1, queries, -1)], -1)[:, None]
    more: dict[str, Any] = {"softcap": 1.5 if "softcap" in options else None}
    if not bool(valid.all()):
        more["valid"] = valid.to(DEVICE)
    if "window" in options:
        columns = torch.arange(end + 5) * 3 + 2 * tokens + torch.randint(0, 3, (rows, kv, 1))
        places = torch.arange(tokens) * 2 + torch.randint(0, 2, (rows, kv, 1))
        logical, window = int(columns.max()) + 1, int(columns.max()) - tokens
        every = torch.cat([columns[..., :end], places], -1)
        visible = visible & (
            every[:, :, None] > torch.arange(logical - queries, logical)[:, None] - window
        )
        more |= {"columns": (columns.int().to(DEVICE), places.int().to(DEVICE))}
        more |= {"logical": logical, "window": window}
    whole = [
        torch.cat(both, 2)
        for both in ((k[:, :, :end], keys.dense()), (v[:, :, :end], values.dense()))
    ]
    wanted = reference.attend(q.float(), *(x.float() for x in whole), visible, 0.3, more["softcap"])
    for row, start in enumerate(starts):
        for x in (k, v):
            x[row, :, :start], x[row, :, end:] = math.nan, math.nan
    out = flash_codes.attend(
        q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), starts.to(DEVICE), end,
        (keys.packed.to(DEVICE), values.packed.to(DEVICE)), tokens, bits, codes.GROUP, 0.3, **more,
    )  # fmt: skip
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    assert error(out, wanted) < CLOSE[dtype]


@settings(deadline=None, max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(
    st.integers(0, 2**31),
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 150)), min_size=1, max_size=2),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([1, 1, 3]),
    st.sampled_from(SIZES),
    st.sampled_from(list(CLOSE)),
    st.sampled_from([4, 2]),
    st.sets(st.sampled_from(["softcap", "window"])),
)
@example(0, [(1, 1)], 1, 1, 1, (64, 64), torch.float32, 2, set())
@example(0, [(1, 64), (9, 0)], 2, 3, 1, (64, 64), torch.bfloat16, 4, set())  # a row parks nothing
@example(0, [(5, 300)], 1, 7, 16, (32, 32), torch.float32, 4, {"window", "softcap"})
def test_the_kernel_equals_the_reference(
    seed: int,
    rows: list[tuple[int, int]],
    kv: int,
    groups: int,
    queries: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    bits: int,
    options: set[str],
) -> None:
    lengths, parked = ([row[i] for row in rows] for i in range(2))
    parked[0] = max(parked[0], 1)
    check(seed, lengths, parked, kv, groups, queries, sizes, dtype, bits, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("options", [set(), {"softcap", "window"}])
def test_on_a_gpu(dtype: torch.dtype, sizes: tuple[int, int], bits: int, options: set[str]) -> None:
    cases: list[tuple[list[int], list[int], int, int]] = [([1], [1], 1, 1)]
    if DEVICE == "cuda":
        cases += [([3000, 1, 777], [5000, 3, 640], 4, 7), ([6000], [26000], 8, 4)]
    else:
        cases += [([30, 1, 7], [50, 3, 64], 1, 3)]
    for queries in (1, 5):
        for lengths, parked, kv, groups in cases:
            check(0, lengths, parked, kv, groups, queries, sizes, dtype, bits, options)


@pytest.mark.parametrize("window", [None, 60])
@pytest.mark.parametrize("home", ["int4", "int2"])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_layer_with_parked_codes_is_attended_alike_with_and_without_the_kernel(
    window: int | None, home: Literal["int4", "int2"], queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one dispatch: a layer with what it parked, by the kernel and without it."""
    torch.manual_seed(0)
    spans = torch.tensor([[0] * 4 + [1] * 90 + [0] * 6, [-1] * 30 + [0] * 5 + [1] * 60 + [0] * 5])
    store = KVStore(torch.randn(2, 2, 100, 32), torch.randn(2, 2, 100, 32), window)
    nothing = torch.zeros(2)
    look = Look(torch.rand(2, 2, 100), spans, nothing.double(), nothing, nothing.long())
    parked = park(store, look, plphp.Recall(home, 0.5))
    assert isinstance(parked, QuantisedHome) and parked.valid is not None
    store.compact(parked.plan)
    store.append(*(torch.randn(2, 2, queries, 32) for _ in range(2)))
    for moved in (store.to, parked.move):
        moved(torch.device(DEVICE))
    q = torch.randn(2, 6, queries, 32, device=DEVICE)
    calls = []
    for kernel in (True, False):
        monkeypatch.setattr(choose, "has_kernel", lambda device, kernel=kernel: kernel)
        calls.append(parked.attend(q, store, 0.3, None).cpu())
    assert error(calls[0], calls[1]) < 1e-5
    assert not torch.equal(calls[0], calls[1]), "the kernel was not taken"
