"""Rounded weights: the kernels against float32 arithmetic, and which layers get how many bits."""

import pytest
import torch
from torch import Tensor, nn

import tiny
from plphp.inputs.rounding import bits_of
from plphp.weights import Int4Linear, Int8Embedding, Int8Linear, linear, round_weights, weight_bytes

# (N, K): whole vectors, odd numbers of rows, and rows that no vector fills
SIZES = [(16, 32), (7, 32), (33, 64), (24, 40), (5, 33), (80, 160)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def in_8_bits(weight: Tensor) -> Tensor:
    """Each row of a weight, as the nearest of 255 numbers between its largest and its negative."""
    step = (weight.float().abs().amax(1, keepdim=True) / 127).to(weight.dtype).float()
    return torch.round(weight.float() / step) * step


def in_4_bits(weight: Tensor) -> Tensor:
    """Each 32 numbers of a row, as the nearest of 16 numbers from the lowest to the highest."""
    parts = weight.float().split(32, 1)
    rounded = []
    for part in parts:
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        step = ((high - low) / 15).to(weight.dtype).float()
        middle = (low + 8 * step).to(weight.dtype).float()
        rounded.append(((part - middle) / step).round().clamp(-8, 7) * step + middle)
    return torch.cat(rounded, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("units", [True, False], ids=["units", "none"])
def test_products_are_those_of_rounded_weights(
    size: tuple[int, int],
    rows: int,
    dtype: torch.dtype,
    units: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "HAS_BFLOAT16", units)
    monkeypatch.setattr(linear, "BLOCK", 100)  # several blocks in every weight
    torch.manual_seed(rows)
    weight, bias = torch.randn(size).to(dtype), nn.Parameter(torch.randn(size[0]).to(dtype))
    x = torch.randn(2, rows, size[1]).to(dtype)
    for kind, rounded in ((Int8Linear, in_8_bits), (Int4Linear, in_4_bits)):
        if kind is Int4Linear and not Int4Linear.fits(weight):
            continue
        wanted = x.float() @ rounded(weight).T + bias.float()
        layer = kind.of(weight, bias)
        got = layer(x)
        assert got.dtype == dtype and got.shape == wanted.shape
        assert (got.float() - wanted).norm() < TOLERANCE[dtype] * wanted.norm()
        assert (layer.weight.float() - rounded(weight)).abs().max() < 2e-2
        assert (layer.weight.dtype, layer.weight.shape) == (dtype, weight.shape)


def test_rows_of_zeros_stay_zeros() -> None:
    for kind in (Int8Linear, Int4Linear):
        assert not kind.of(torch.zeros(16, 32))(torch.ones(1, 32)).any()


def test_sizes_that_4_bits_cannot_have() -> None:
    with pytest.raises(ValueError, match="multiples of 16 rows and of 32 columns"):
        Int4Linear.of(torch.ones(16, 40))


@pytest.mark.parametrize("bits", [8, 4])
def test_the_decoder_gets_the_bits_and_the_rest_gets_8(bits: int) -> None:
    family = tiny.FAMILIES["qwen2_vl"]
    model = family.build(0)
    before, parts = weight_bytes(model), dict(model.named_modules())
    round_weights(model, bits)
    kinds = {
        name: type(module)
        for name, module in model.named_modules()
        if type(parts[name]) is nn.Linear
    }
    assert all(kind in (Int8Linear, Int4Linear) for kind in kinds.values())
    inside = {kind for name, kind in kinds.items() if ".language_model." in name}
    outside = {kind for name, kind in kinds.items() if ".language_model." not in name}
    assert inside == {Int4Linear if bits == 4 else Int8Linear}
    assert outside == {Int8Linear}
    assert type(model.get_input_embeddings()) is Int8Embedding
    assert weight_bytes(model) < 0.6 * before


def test_a_tied_head_and_the_table_are_one_tensor() -> None:
    model = tiny.FAMILIES["qwen2_vl"].build(0)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    ids = torch.arange(8)[None]
    wanted = model(input_ids=ids).logits
    round_weights(model, 8)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.codes.data_ptr() == table.codes.data_ptr()
    assert (model(input_ids=ids).logits - wanted).norm() < 0.02 * wanted.norm()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="needs --device cpu"):
        bits_of("int4", "cuda", "auto")
    with pytest.raises(ValueError, match="known are int8 and int4"):
        bits_of("int3", "cpu", "auto")
    with pytest.raises(ValueError, match="needs --dtype bfloat16"):
        bits_of("int4", "cpu", "float32")
    assert bits_of(None, "cuda", "float32") is None
