"""Numbers rounded to 4 or 2 bits, several a byte (KIVI, Liu et al. 2024, arXiv 2402.02750).

    step = (max - low) / (2^bits - 1)   over a group; keys: 32 tokens of one channel, because keys
    code = round((x - low) / step)      have channels that stand out; values: one token

`step` and `low` are kept in the dtype of x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.recall.options import GROUP

BLOCK = 64 * GROUP  # tokens that are made numbers again at a time


@dataclass
class Codes:
    """x (..., P, D) as packed (..., P, D * bits / 8) uint8.

    step, low: (..., groups, D), a range for every `group` tokens, or (..., P, 1) for every token
    """

    packed: Tensor
    step: Tensor
    low: Tensor
    bits: int

    def dense(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Tokens begin to end, (..., tokens, D) in the dtype of x. begin: a multiple of `GROUP`."""
        packed = self.packed[..., begin:end, :]
        mask = 2**self.bits - 1
        parts = [(packed >> shift) & mask for shift in range(0, 8, self.bits)]
        codes = torch.cat(parts, -1).to(self.step.dtype)
        step, low = (_ranges(x, begin, packed.shape[-2]) for x in (self.step, self.low))
        return codes * step + low

    def products(self, query: Tensor) -> Tensor:
        """query (..., T, D) times every token: (..., T, P'), a block of tokens at a time."""
        return torch.cat([query @ block.mT for _, block in self._blocks()], -1)

    def read(self, weights: Tensor) -> Tensor:
        """weights (..., T, P') of the tokens: their sum (..., T, D)."""
        return sum(weights[..., i : i + block.shape[-2]] @ block for i, block in self._blocks())  # type: ignore[return-value]

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        length = self.packed.shape[-2]
        for begin in range(0, length, BLOCK):
            yield begin, self.dense(begin, min(begin + BLOCK, length))

    def tensors(self) -> list[Tensor]:
        return [self.packed, self.step, self.low]

    def through(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every tensor changed: other rows, another device."""
        return Codes(change(self.packed), change(self.step), change(self.low), self.bits)


def keys_to_codes(keys: Tensor, bits: int) -> Codes:
    """(B, Hkv, P, D) per channel in groups of tokens; the last group may be short."""
    short = -keys.shape[2] % GROUP
    whole = torch.cat([keys, keys[:, :, -1:].expand(-1, -1, short, -1)], 2)
    groups = whole.reshape(*keys.shape[:2], -1, GROUP, keys.shape[-1])
    step, low = (x[:, :, :, 0] for x in _range(groups, bits, -2))
    return _rounded(keys, step, low, bits)


def values_to_codes(values: Tensor, bits: int) -> Codes:
    """(B, Hkv, P, D) per token."""
    return _rounded(values, *_range(values, bits, -1), bits)


def _rounded(x: Tensor, step: Tensor, low: Tensor, bits: int) -> Codes:
    wide, least = (_ranges(part, 0, x.shape[2]).float() for part in (step, low))
    codes = ((x.float() - least) / wide).round().clamp(0, 2**bits - 1)
    return Codes(_pack(codes, bits), step, low, bits)


def _ranges(x: Tensor, begin: int, tokens: int) -> Tensor:
    """A range for every token from `begin` on, of one for every group or for every token."""
    if x.shape[-1] == 1:
        return x[..., begin : begin + tokens, :]
    own = x[..., begin // GROUP : -(-(begin + tokens) // GROUP), :]
    return own.repeat_interleave(GROUP, -2)[..., :tokens, :]


def code_bytes(tokens: Tensor, dims: tuple[int, int], bits: int, itemsize: int) -> Tensor:
    """Bytes of the keys and values of so many tokens (B,) in a KV head."""
    groups = (tokens + GROUP - 1) // GROUP
    numbers = 2 * itemsize * (groups * dims[0] + tokens)
    return tokens * sum(dims) * bits // 8 + numbers


def _range(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor]:
    low, high = (end.float() for end in (x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)))
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-6)
    return step.to(x.dtype), low.to(x.dtype)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(..., D) whole numbers below 2**bits -> (..., D * bits / 8) uint8."""
    parts = codes.to(torch.uint8).chunk(8 // bits, -1)
    packed = torch.zeros_like(parts[0])
    for number, part in enumerate(parts):
        packed |= part << (bits * number)
    return packed
