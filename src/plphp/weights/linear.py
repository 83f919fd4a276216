"""Layers with weights of 8 or 4 bits, on the CPU kernels that torch brings.

8 bits: each output row of a weight has one scale, w = scale * code, with codes from -127 to 127.
4 bits: each 32 numbers of an output row have a range, w = scale * (code - 8) + zero, with codes
from 0 to 15. A number takes 5 bits then, as in Q4_1 of llama.cpp.
Scales are rounded to the model's dtype first and then used to compute the codes, so that a code is
the nearest one to its weight.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plphp.errors import InputError

GROUP = 32  # numbers of a row that share a range in 4 bits
ROWS = 16  # the 4-bit kernel needs a multiple of so many output rows
BLOCK = 2**20  # how many numbers of a weight are rounded at a time
# Whether the processor multiplies bfloat16 matrices itself, as torch sees it.
HAS_BFLOAT16: bool = torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
FEW = 32  # rows of x up to which the 8-bit kernel is faster than one product of decoded weights


class Rounded(nn.Module):
    """What linear layers with rounded weights share.

    bias: (N,) in the model's dtype, or None
    """

    def __init__(self, sizes: tuple[int, int], bias: nn.Parameter | None) -> None:
        """sizes: N and K."""
        super().__init__()
        self.out_features, self.in_features = sizes
        self.bias = bias
        self._is_hf_initialized = True  # transformers leaves the layer as it is after loading

    def forward(self, x: Tensor) -> Tensor:
        """x @ weight.T + bias. x: (..., K); returns (..., N) in the dtype of x."""
        y = self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Linear(Rounded):
    """A linear layer with weights of 8 bits.

    codes: (N, K) int8; scales: (N,) in the model's dtype
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__((codes.shape[0], codes.shape[1]), bias)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None = None) -> Int8Linear:
        """Round a weight (N, K), which is not kept."""
        return cls(*to_int8(weight), bias)

    @property
    def weight(self) -> Tensor:
        """The rounded weight (N, K) in the model's dtype; some models ask for its dtype."""
        return from_int8(self.codes, self.scales)

    def _product(self, x: Tensor) -> Tensor:
        # The kernel reads each row of codes in whole vectors, and past its end otherwise.
        if len(x) > FEW or self.in_features % GROUP:
            return _in_full(x, self.codes) * self.scales
        product: Tensor = torch.ops.aten._weight_int8pack_mm(x, self.codes, self.scales)
        return product


class Int4Linear(Rounded):
    """A linear layer with weights of 4 bits.

    codes: (N, K / 2) uint8, in an order that depends on the processor
    ranges: (K / GROUP, N, 2) in the model's dtype, scale and zero
    """

    codes: Tensor
    ranges: Tensor

    def __init__(self, codes: Tensor, ranges: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__((ranges.shape[1], ranges.shape[0] * GROUP), bias)
        self.register_buffer("codes", codes)
        self.register_buffer("ranges", ranges)

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None = None) -> Int4Linear:
        """Round a weight (N, K), which is not kept. Raises InputError where `fits` says no."""
        if not cls.fits(weight):
            raise InputError(
                f"a weight in 4 bits needs multiples of {ROWS} rows and of {GROUP} columns, got "
                f"{tuple(weight.shape)}: use 8 bits"
            )
        codes = weight.new_empty(weight.shape, dtype=torch.int32)
        ranges = weight.new_empty(weight.shape[1] // GROUP, weight.shape[0], 2)
        for rows in _blocks(weight):
            groups = weight.detach()[rows].float().view(-1, len(ranges), GROUP)
            low, high = groups.aminmax(dim=-1)
            scale = ((high - low) / 15).clamp(min=1e-6).to(weight.dtype)
            zero = (low + 8 * scale.float()).to(weight.dtype)
            steps = (groups - zero.float()[..., None]) / scale.float()[..., None] + 8
            codes[rows] = steps.round_().clamp_(0, 15).flatten(1).to(torch.int32)
            ranges[:, rows] = torch.stack([scale, zero], -1).transpose(0, 1)
        return cls(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), ranges, bias)

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Whether the kernel takes a weight (N, K)."""
        return weight.shape[0] % ROWS == 0 and weight.shape[1] % GROUP == 0

    @property
    def weight(self) -> Tensor:
        """The rounded weight (N, K) in the model's dtype."""
        one = torch.eye(self.in_features, dtype=self.ranges.dtype, device=self.ranges.device)
        return self._product(one).T

    def _product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.codes, GROUP, self.ranges
        )
        return product


class Int8Embedding(nn.Module):
    """A table of embeddings with 8 bits a number; it may share its tensors with the output head.

    codes: (V, K) int8; scales: (V,) in the model's dtype
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = codes.shape
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self._is_hf_initialized = True

    @property
    def weight(self) -> Tensor:
        """The rounded table (V, K) in the model's dtype."""
        return from_int8(self.codes, self.scales)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows (..., K) of ids (...) int64, in the model's dtype."""
        return from_int8(self.codes[ids], self.scales[ids])


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K) int8 and scales (N,) of a weight (N, K), in its dtype."""
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    scales = weight.new_empty(len(weight))
    for rows in _blocks(weight):
        wide = weight.detach()[rows].float()
        scales[rows] = (wide.abs().amax(-1) / 127).clamp(min=1e-6).to(weight.dtype)
        steps = wide / scales[rows].float()[:, None]
        codes[rows] = steps.round_().clamp_(-127, 127).to(torch.int8)
    return codes, scales


def _in_full(x: Tensor, codes: Tensor) -> Tensor:
    """x @ codes.T for x (rows, K) and codes (N, K) int8, in the dtype of x.

    Without bfloat16 units a product in bfloat16 takes several times as long as one in float32.
    """
    if x.dtype != torch.bfloat16 or HAS_BFLOAT16:
        return F.linear(x, codes.to(x.dtype))
    wide = x.float()
    parts = [F.linear(wide, codes[rows].float()).to(x.dtype) for rows in _blocks(codes)]
    return torch.cat(parts, -1)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Rows of a weight (N, K), a few at a time, so that no large copy in float32 is made."""
    length = max(1, BLOCK // weight.shape[1])
    return (slice(begin, begin + length) for begin in range(0, len(weight), length))


def from_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers (..., K) of codes (..., K) int8 and scales (...), in the dtype of the scales."""
    return codes.to(scales.dtype) * scales[..., None]
