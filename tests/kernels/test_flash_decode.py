"""The Triton kernel against the float32 reference: in Triton's interpreter, and on a GPU."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from plphp.attention import choose, decode_attention, reference
from plphp.cache import KVStore, StaticStore
from plphp.policy.view import pack

pytest.importorskip("triton", reason="Triton is not to be had for this platform")
from plphp.attention import flash_decode as fd
from plphp.attention import launch
from plphp.attention.tuned import Costs

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = [(32, 32), (64, 64), (72, 72), (80, 96), (128, 128), (112, 64), (256, 256)]


def error(out: Tensor, wanted: Tensor) -> float:
    return float((out.float() - wanted).norm() / wanted.norm().clamp(min=1e-9))


def buffers(
    seed: int, starts: list[int], end: int, kv: int, sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values in the middle of larger buffers: slots that no row owns hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    both = []
    for size in sizes:
        whole = torch.randn(len(starts), kv, end + 9, size + 8, generator=generator).to(dtype)
        part = whole[:, :, 2:, :size]
        part[:, :, end:] = math.nan
        for row, start in enumerate(starts):
            part[row, :, :start] = math.nan
        both.append(part.to(DEVICE))
    return both[0], both[1]


def owned(starts: list[int], end: int, queries: int) -> Tensor:
    """(B, 1, T, end) bool, what the last columns see of their rows."""
    slots = torch.arange(end)
    before = slots <= torch.arange(end - queries, end)[:, None]
    return ((slots >= torch.tensor(starts)[:, None])[:, None] & before)[:, None]


def check(
    seed: int,
    lengths: list[int],
    kv: int,
    groups: int,
    queries: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    splits: int | None,
    options: set[str] | frozenset[str] = frozenset(),
) -> None:
    end = max(lengths) + queries - 1
    starts = [max(lengths) - length for length in lengths]
    k, v = buffers(seed, starts, end, kv, sizes, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(len(starts), queries, kv * groups, sizes[0], generator=generator)
    q = q.to(DEVICE, dtype).transpose(1, 2)
    visible = owned(starts, end, queries)
    more: dict[str, Any] = {"softcap": 1.5 if "softcap" in options else None}
    on_device = "on device" in options
    if "window" in options:
        columns = torch.arange(k.shape[2]) * 3 + torch.randint(0, 3, (len(starts), kv, 1))
        logical, window = int(columns.max()) + 1, max(2 * end, queries)
        visible = visible & (
            columns[:, :, None, :end] > torch.arange(logical - queries, logical)[:, None] - window
        )
        more |= {"columns": columns.int().to(DEVICE), "window": window}
        more["logical"] = torch.tensor(logical, device=DEVICE) if on_device else logical
    if "new_mask" in options:
        new_mask = torch.rand(len(starts), 1, queries, queries, generator=generator) > 0.5
        visible = visible.expand(-1, visible.shape[1], -1, -1).clone()
        visible[..., end - queries :] = new_mask
        more["new_mask"] = new_mask.to(DEVICE)
    clean = [x[:, :, :end].float().cpu().nan_to_num(0.0) for x in (k, v)]
    wanted = reference.attend(q.float().cpu(), *clean, visible, 0.3, more["softcap"])
    out = fd.attend(
        q, k, v, torch.tensor(starts, device=DEVICE),
        torch.tensor(end, device=DEVICE) if on_device else end, 0.3, **more, splits=splits,
    )  # fmt: skip
    assert out.dtype == dtype
    assert out.shape == wanted.shape
    assert out.transpose(1, 2).is_contiguous()
    # A query that sees nothing has no attention: the formula says NaN, the kernel 0.
    assert error(out.cpu(), wanted.nan_to_num(0.0)) < CLOSE[dtype]


FLAGS = st.sets(st.sampled_from(["softcap", "window", "new_mask", "on device"]))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 60), min_size=1, max_size=2),
    st.integers(1, 2),
    st.integers(1, 4),
    st.sampled_from([1, 1, 3]),
    st.sampled_from(SIZES),
    st.sampled_from(list(CLOSE)),
    st.sampled_from([None, 1, 3]),
    FLAGS,
)
@example(0, [1], 1, 1, 1, (64, 64), torch.float32, None, set())  # the one new key
@example(0, [1, 60], 2, 3, 1, (64, 64), torch.bfloat16, 3, {"on device"})  # splits without keys
@example(
    0, [40], 1, 7, 16, (32, 32), torch.float32, 2, {"new_mask"}
)  # several blocks of query rows
def test_the_kernel_equals_the_reference(
    seed: int,
    lengths: list[int],
    kv: int,
    groups: int,
    queries: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    splits: int | None,
    options: set[str],
) -> None:
    check(seed, lengths, kv, groups, queries, sizes, dtype, splits, options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("queries", [1, 5, 16])
@pytest.mark.parametrize("options", [set(), {"on device"}, {"softcap", "window", "new_mask"}])
def test_on_a_gpu(
    dtype: torch.dtype, sizes: tuple[int, int], queries: int, options: set[str]
) -> None:
    cases: list[tuple[list[int], int, int]] = [([1], 1, 1)]
    cases += [([5000, 1, 777], 4, 7), ([33000], 8, 4)] if ON_GPU else [([50, 1, 7], 1, 3)]
    for lengths, kv, groups in cases:
        check(0, lengths, kv, groups, queries, sizes, dtype, None, options)


def step_graph(step: Any) -> Any:
    """A CUDA graph of a step after a warm-up, which compiles the kernels; on a CPU the step."""
    step()
    if not ON_GPU:
        return SimpleNamespace(replay=step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.gpu
def test_a_captured_graph_follows_the_length() -> None:
    q, slots = torch.randn(2, 8, 1, 64, device=DEVICE), 4096 if ON_GPU else 128
    k, v = (torch.randn(2, 2, slots, 64, device=DEVICE) for _ in range(2))
    start, end = torch.tensor([0, 5], device=DEVICE), torch.tensor(100, device=DEVICE)
    out = torch.empty(2, 8, 1, 64, device=DEVICE)
    graph = step_graph(lambda: out.copy_(fd.attend(q, k, v, start, end, 0.1)))
    for length in (6, 100, slots):
        end.fill_(length)
        graph.replay()
        visible = owned([0, 5], length, 1).to(DEVICE)
        wanted = reference.attend(q, k[:, :, :length], v[:, :, :length], visible, 0.1)
        assert error(out, wanted) < 1e-5


def held(window: int | None, equal: bool) -> KVStore:
    """A pruned layer of two rows whose lengths differ, on the device of the test."""
    torch.manual_seed(0)
    store = KVStore(torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 24), window)
    keep = torch.zeros(2, 2, 30, dtype=torch.bool)
    for row, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        keep[row, head, torch.randperm(30)[: 12 if row == 0 or equal else 7]] = True
    nothing = torch.full((2,), math.nan)
    store.compact(pack(keep, nothing, nothing.double(), torch.full((2,), -1)), reserve=20)
    store.to(torch.device(DEVICE))
    return store


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the kernel whatever the device; the list grows by the keys of every call."""
    calls: list[int] = []
    original = fd._launch

    def counted(q: Tensor, k: Tensor, *args: Any) -> Tensor:
        calls.append(k.shape[2])
        return original(q, k, *args)

    monkeypatch.setattr(fd, "_launch", counted)
    monkeypatch.setattr(choose, "has_kernel", lambda device: True)
    monkeypatch.setattr(choose, "KERNEL_FROM", {"plain": 0, "masked": 0})
    return calls


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_pruned_layer_is_attended_alike_with_and_without_the_kernel(
    kernel: list[int], window: int | None, equal: bool, frozen: bool, queries: int
) -> None:
    store: Any = held(window, equal)
    if frozen:
        store = StaticStore(store)
    for _ in range(3):
        q = torch.randn(2, 6, queries, 16, device=DEVICE)
        new = [torch.randn(2, 2, queries, size, device=DEVICE) for size in (16, 24)]
        store.append(*new)
        out = decode_attention(q, store, 0.3)
        wanted = reference.attend(q, *store.held(), store.visible(queries), 0.3)
        assert error(out, wanted) < 1e-5
    assert len(kernel) == 3


def test_the_mask_of_the_new_columns_is_applied(kernel: list[int]) -> None:
    store = held(None, False)
    q = torch.randn(2, 6, 3, 16, device=DEVICE)
    store.append(*(torch.randn(2, 2, 3, size, device=DEVICE) for size in (16, 24)))
    new_mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1]], device=DEVICE).bool()[None, None]
    out = decode_attention(q, store, 0.3, new_mask=new_mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "has_kernel", lambda device: False)
        wanted = decode_attention(q, store, 0.3, new_mask=new_mask)
    assert error(out, wanted) < 1e-5
    assert len(kernel) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_step_is_one_graph_for_every_length_and_capacity(kernel: list[int]) -> None:
    def step(q: Tensor, store: StaticStore, k: Tensor, v: Tensor) -> Tensor:
        store.append(k, v)
        return decode_attention(q, store, 0.3)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for slack in (10, 40, 70):
        store = held(None, False)
        store._grow(store.end + slack)
        frozen = StaticStore(store)
        for _ in range(2):
            q = torch.randn(2, 6, 1, 16, device=DEVICE)
            new = [torch.randn(2, 2, 1, size, device=DEVICE) for size in (16, 24)]
            with torch.no_grad():
                out = compiled(q, frozen, *new)
            wanted = reference.attend(q, *frozen.held(), frozen.visible(1), 0.3)
            assert error(out, wanted) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(set(kernel)) == 3


def test_the_custom_operator_passes_opcheck() -> None:
    """What torch.compile takes for granted: shapes, strides and that no argument is written to."""
    q = torch.randn(1, 2, 1, 16, device=DEVICE)
    k, v = (torch.randn(1, 1, 20, 16, device=DEVICE) for _ in range(2))
    start, end = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.tensor(9, device=DEVICE)
    args = (q, k, v, start, end, 0.3, None, None, end, 0, None, None)
    torch.library.opcheck(fd._op, args)


@given(st.integers(1, 4096), st.integers(1, 4096), st.sampled_from([46, 108, 132]))
def test_every_split_has_keys_and_splits_shorten_the_longest_program(
    programs: int, blocks: int, multiprocessors: int
) -> None:
    def blocks_in_a_row(splits: int) -> int:
        waves = math.ceil(programs * splits / (multiprocessors * launch.COSTS.resident))
        return waves * math.ceil(blocks / splits)

    splits = launch.split_count(programs, blocks, multiprocessors)
    assert 1 <= splits <= min(blocks, launch.MOST_SPLITS)
    assert splits == 1 or blocks_in_a_row(splits) < blocks_in_a_row(1)


def test_one_long_row_keeps_every_multiprocessor_busy() -> None:
    costs = Costs(resident=2, start=2, second=4)  # whatever `make gpu-import` has written
    assert launch.split_count(programs=4, blocks=1024, multiprocessors=132, costs=costs) == 64
    assert launch.split_count(programs=32, blocks=512, multiprocessors=132, costs=costs) == 8
    assert launch.split_count(programs=264, blocks=512, multiprocessors=132, costs=costs) == 1


@pytest.mark.slow  # 47 seconds
@pytest.mark.skipif(ON_GPU, reason="the tests above have compiled it")
def test_it_compiles_for_gpus_that_are_not_here() -> None:
    """Down to machine code: nothing that only the interpreter takes, and shared memory suffices."""
    script = Path(__file__).with_name("compile_offline.py")
    done = subprocess.run([sys.executable, str(script), "80", "90"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.split() for line in done.stdout.splitlines()]
    shared = {name: [int(x[2]) for x in found if x[1] == name] for _, name, _ in found}
    assert len(shared["_split_kernel"]) == 14 and len(shared["_codes_kernel"]) == 6
    least = 99 * 1024  # what the smallest of these GPUs gives a program
    assert all(size < least for sizes in shared.values() for size in sizes)
