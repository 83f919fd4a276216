"""Fast paths against the float32 reference, and the reference against a loop."""

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plphp.attention import reference, scoring, sdpa


def tensors(
    seed: int, batch: int, kv_heads: int, groups: int, queries: int, keys: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, kv_heads * groups, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    v = torch.randn(batch, kv_heads, keys, dim + 2, generator=generator)
    return q, k, v


def test_reference_is_the_textbook_loop() -> None:
    q, k, v = tensors(0, 2, 2, 3, 2, 5, 4)
    visible = torch.rand(2, 1, 2, 5) > 0.3
    visible[..., 0] = True
    out = reference.attend(q, k, v, visible, 0.5)
    for b in range(2):
        for h in range(6):
            for t in range(2):
                logits = [
                    float(q[b, h, t] @ k[b, h // 3, s]) * 0.5 if visible[b, 0, t, s] else -math.inf
                    for s in range(5)
                ]
                top = max(logits)
                weights = [math.exp(x - top) for x in logits]
                wanted = sum(w / sum(weights) * v[b, h // 3, s] for s, w in enumerate(weights))
                torch.testing.assert_close(out[b, h, t], wanted)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(["none", "rows", "heads"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(1, 9),
)
def test_sdpa_equals_the_reference(
    seed: int,
    batch: int,
    kv: int,
    groups: int,
    t: int,
    s: int,
    kind: str,
    dtype: torch.dtype,
    threads: int,
) -> None:
    q, k, v = (x.to(dtype) for x in tensors(seed, batch, kv, groups, t, s, 8))
    shape = {"none": None, "rows": (batch, 1, t, s), "heads": (batch, kv, t, s)}[kind]
    visible = None
    if shape is not None:
        visible = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
        visible[..., -1] = True
    wanted = reference.attend(q.float(), k.float(), v.float(), visible, 0.3)
    with patch.object(torch, "get_num_threads", lambda: threads):
        out = sdpa.attend(q, k, v, visible, 0.3)
    assert out.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), wanted, atol=close, rtol=close)


def test_attention_is_split_into_enough_parts_for_all_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cpu = torch.device("cpu")
    assert [sdpa.parts(tasks, 6, cpu) for tasks in (1, 2, 3, 4, 8, 64)] == [6, 6, 3, 2, 1, 1]
    assert sdpa.parts(2, 7, cpu) == 7
    assert sdpa.parts(1, 1, cpu) == 1
    assert sdpa.parts(1, 6, torch.device("cuda")) == 1


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_stream_over_blocks(monkeypatch: pytest.MonkeyPatch, softcap: float | None) -> None:
    q, k, _ = tensors(1, 2, 2, 2, 1, 37, 8)
    valid = torch.ones(2, 37, dtype=torch.bool)
    valid[1, :9] = False
    wanted = reference.probabilities(q, k, valid[:, None, None], 0.4, softcap)[:, :, 0]
    monkeypatch.setattr(scoring, "BLOCK", 10)
    probs = scoring.last_token_probabilities(q[:, :, 0], k, valid, 0.4, softcap)
    torch.testing.assert_close(probs, wanted)
    assert (probs[1, :, :9] == 0).all()


def test_scores_are_float32_whatever_the_dtype() -> None:
    q, k, _ = tensors(2, 1, 2, 2, 1, 64, 16)
    valid = torch.ones(1, 64, dtype=torch.bool)
    half = scoring.last_token_probabilities(q[:, :, 0].bfloat16(), k.bfloat16(), valid, 0.25)
    wanted = reference.probabilities(q.bfloat16(), k.bfloat16(), None, 0.25)[:, :, 0]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wanted, atol=1e-6, rtol=1e-5)
