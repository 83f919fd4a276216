"""Training in bfloat16: the attention, gradients and updates of float32, but for rounding."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from training.attention import attend
from training.optim import Muon, orthogonal

from training import machine


def _parts(queries: int, keys: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    sizes = (queries, keys, keys)
    return [torch.randn(2, 3, n, 8, generator=generator).requires_grad_() for n in sizes]


def _gradients(out: Tensor, parts: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return list(torch.autograd.grad((out.float() * weights).sum(), parts))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_bfloat16_is_that_of_float32(causal: bool) -> None:
    queries, keys = (24, 24) if causal else (16, 40)
    parts = _parts(queries, keys)
    mask = None
    if not causal:
        mask = torch.ones(2, 1, queries, keys, dtype=torch.bool).tril(keys - queries)
        mask[:, :, :, 3:7] = False
    wanted = functional.scaled_dot_product_attention(*parts, attn_mask=mask, is_causal=causal)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(*parts, mask, causal)
    assert got.dtype == torch.bfloat16
    pairs = zip([wanted, *_gradients(wanted, parts)], [got, *_gradients(got, parts)], strict=True)
    for exact, rounded in pairs:
        assert (rounded.float() - exact).norm() < 0.01 * exact.norm()


def test_attention_in_float32_is_left_to_pytorch() -> None:
    parts = _parts(5, 9)
    wanted = functional.scaled_dot_product_attention(*parts)
    assert torch.equal(attend(*parts), wanted)


def test_muon_iterates_in_bfloat16_and_keeps_float32_weights() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 48))
    weight.grad = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    Muon([weight], 0.1, torch.bfloat16).step()
    update = -weight.detach() / (0.1 * 0.2 * 48**0.5)
    exact = orthogonal(weight.grad[None])[0]
    assert weight.dtype == torch.float32
    assert (update - exact).norm() < 0.03 * exact.norm()


def test_the_processor_decides_on_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_flags", lambda: "flags: avx2 avx512f")
    assert machine.fastest_dtype() == torch.float32
    machine.keep_memory()  # changes nothing that can be seen, and fails nowhere
