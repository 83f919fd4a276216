"""The kernels against float32 on the same device, at the sizes of real models."""

from typing import Literal

import pytest
import torch
from on_device import DEVICE, error, real

import plphp
from plphp.attention import choose, reference
from plphp.cache import KVStore
from plphp.policy import Look
from plphp.recall import codes, park

pytest.importorskip("triton", reason="Triton is not to be had for this platform")
from plphp.attention import flash_codes, flash_decode

pytestmark = pytest.mark.gpu
# rows, KV heads, query heads of each, slots: qwen2-vl-7b with 40 % of 32k and all of 128k kept,
# llava-1.5-7b, and Gemma's heads of 256 numbers.
SHAPES = [
    real((8, 4, 7, 13130, 128), (2, 2, 3, 70, 32)),
    real((1, 4, 7, 131072, 128), (1, 1, 3, 90, 32)),
    real((8, 32, 1, 8192, 128), (1, 2, 1, 40, 32)),
    real((2, 4, 2, 9001, 256), (1, 1, 2, 33, 64)),
]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values."""
    rows, kv, groups, slots, dim = shape
    torch.manual_seed(0)
    q = torch.randn(rows, kv * groups, 1, dim, device=DEVICE).to(dtype)
    k, v = (torch.randn(rows, kv, slots, dim, device=DEVICE).to(dtype) for _ in range(2))
    return q, k, v + 1


def in_float32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None
) -> torch.Tensor:
    """The formula, row by row, which saves memory."""
    outs = []
    for row in range(len(q)):
        one = [x[row : row + 1].float() for x in (q, k, v)]
        seen = None if visible is None else visible[row : row + 1]
        outs.append(reference.attend(one[0], one[1], one[2], seen, 0.09))
    return torch.cat(outs)


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", SHAPES, ids=["7b", "128k", "no-gqa", "wide"])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_in_full(shape: tuple[int, ...], dtype: torch.dtype, masked: bool) -> None:
    q, k, v = drawn(shape, dtype)
    slots = k.shape[2]
    start = torch.zeros(len(q), dtype=torch.int64, device=DEVICE)
    end: int | torch.Tensor = slots
    visible = None
    if masked:  # rows of different lengths, which the device knows alone
        start = torch.arange(len(q), device=DEVICE) * (slots // (2 * len(q)))
        end = torch.tensor(slots, device=DEVICE)
        places = torch.arange(slots, device=DEVICE)
        visible = (places >= start[:, None])[:, None, None]
    out = flash_decode.attend(q, k, v, start, end, 0.09)
    assert error(out, in_float32(q, k, v, visible)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=["7b", "128k", "no-gqa", "wide"])
def test_keys_in_codes(shape: tuple[int, ...], bits: int, dtype: torch.dtype) -> None:
    """A fifth of the tokens in full, the others in codes, fused in one call."""
    q, k, v = drawn(shape, dtype)
    full = k.shape[2] // 5
    keys = codes.keys_to_codes(k[:, :, full:].contiguous(), bits)
    values = codes.values_to_codes(v[:, :, full:].contiguous(), bits)
    k, v = k[:, :, :full].contiguous(), v[:, :, :full].contiguous()
    start = torch.zeros(len(q), dtype=torch.int64, device=DEVICE)
    out = flash_codes.attend(
        q, k, v, start, full, (keys.packed, values.packed), keys.tokens, bits, keys.group, 0.09
    )
    whole = [torch.cat([x.float(), y.dense()], 2) for x, y in ((k, keys), (v, values))]
    assert error(out, in_float32(q, *whole, None)) < 1.5 * CLOSE[dtype]


@pytest.mark.parametrize("home", ["int4", "int2"])
def test_a_home_takes_the_fused_kernel(
    home: Literal["int4", "int2"], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, kv, _, slots, _ = SHAPES[0]
    q, k, v = drawn(SHAPES[0], torch.float32)
    spans = torch.ones(rows, slots, dtype=torch.int64, device=DEVICE)
    spans[:, -5:] = 0
    store, none = KVStore(k, v), torch.zeros(rows, device=DEVICE)
    scores = torch.rand(rows, kv, slots, device=DEVICE)
    look = Look(scores, spans, none.double(), none, none.long())
    parked = park(store, look, plphp.Recall(home, 0.4))
    store.compact(parked.plan)
    monkeypatch.setattr(choose, "has_kernel", lambda device: True)
    out = parked.attend(q, store, 0.09, None)
    monkeypatch.setattr(choose, "has_kernel", lambda device: False)
    assert error(out, parked.attend(q, store, 0.09, None)) < 1e-5
