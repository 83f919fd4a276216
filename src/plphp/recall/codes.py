"""Numbers rounded to 4 or 2 bits, row by row (KIVI, Liu et al. 2024, arXiv 2402.02750).

    step = (max - low) / (2^bits - 1)   over a row. Keys: 32 tokens of one channel, because keys
    code = round((x - low) / step)      have channels that stand out. Values: one token

A row is its codes, the first number in the lowest bits, filled up to 16 bits, and then `step` and
`low` in float16. PyTorch's quantized embeddings have the same format, and on the CPU their operator
makes numbers of codes in one pass over memory; elsewhere tensor operations do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Count = TypeVar("Count", int, Tensor)

GROUP = 32  # tokens of a channel of the keys that share a range
RANGE_BYTES = 4  # of a range: step and lowest number in float16
BLOCK = 2**19  # numbers that are there again at a time: 2 MiB, what two cores' caches hold


@dataclass
class KeyCodes:
    """Keys (B, Hkv, P, D) in packed (B, Hkv, bytes) uint8.

    Every channel's whole groups of tokens, channel by channel, and then their last tokens, where
    they are no group: (D, P // GROUP, row) and (D, shorter row).
    """

    packed: Tensor
    bits: int
    tokens: int
    dim: int
    group: ClassVar[int] = GROUP

    def products(self, query: Tensor) -> Iterator[Tensor]:
        """query (B, Hkv, T, D) float32 times every key: (B, Hkv, T, P) float32 in blocks of P."""
        return (query @ block for block in self._blocks())

    def dense(self) -> Tensor:
        """(B, Hkv, P, D) float32."""
        none = self.packed.new_empty(*self.packed.shape[:2], 0, self.dim, dtype=torch.float32)
        return torch.cat([none, *(block.mT for block in self._blocks())], 2)

    def _blocks(self) -> Iterator[Tensor]:
        """(B, Hkv, D, tokens) float32, in order."""
        lead, (whole, rest) = self.packed.shape[:2], divmod(self.tokens, GROUP)
        row = row_bytes(GROUP, self.bits)
        end = self.dim * whole * row
        groups, last = self.packed[..., :end], self.packed[..., end:]
        if whole:
            rows = groups.view(*lead, self.dim, whole, row)
            length = _share(lead.numel() * self.dim * GROUP)
            for part in torch.split(rows, length, 3):
                yield from_rows(part, self.bits).flatten(3)
        if rest:
            yield from_rows(last.view(*lead, self.dim, -1), self.bits)[..., :rest]

    def through(self, change: Callable[[Tensor], Tensor]) -> KeyCodes:
        """The same with its tensor changed: other rows, another device."""
        return replace(self, packed=change(self.packed))


@dataclass
class ValueCodes:
    """Values (B, Hkv, P, Dv) in packed (B, Hkv, P, bytes) uint8."""

    packed: Tensor
    bits: int
    dim: int

    def read(self, weights: Tensor) -> Tensor:
        """weights (B, Hkv, T, P) float32 of the tokens: their sum (B, Hkv, T, Dv) float32."""
        parts = torch.split(weights, self._length(), -1)
        sums = (part @ block for part, block in zip(parts, self._blocks(), strict=True))
        return reduce(torch.add, sums)

    def dense(self) -> Tensor:
        """(B, Hkv, P, Dv) float32."""
        none = self.packed.new_empty(*self.packed.shape[:2], 0, self.dim, dtype=torch.float32)
        return torch.cat([none, *self._blocks()], 2)

    def _blocks(self) -> Iterator[Tensor]:
        for part in torch.split(self.packed, self._length(), 2):
            if not part.shape[2]:
                return
            yield from_rows(part, self.bits)[..., : self.dim]

    def _length(self) -> int:
        return _share(self.packed.shape[:2].numel() * self.dim)

    def through(self, change: Callable[[Tensor], Tensor]) -> ValueCodes:
        """The same with its tensor changed: other rows, another device."""
        return replace(self, packed=change(self.packed))


def keys_to_codes(keys: Tensor, bits: int) -> KeyCodes:
    """(B, Hkv, P, D) per channel in groups of tokens; the last group may be short."""
    channels, whole = keys.mT, keys.shape[2] // GROUP * GROUP
    packed = [keys.new_empty(*keys.shape[:2], 0, dtype=torch.uint8)]
    if whole:
        groups = channels[..., :whole].reshape(*channels.shape[:3], -1, GROUP)
        packed.append(to_rows(groups, bits).flatten(2))
    if keys.shape[2] > whole:
        packed.append(to_rows(channels[..., whole:], bits).flatten(2))
    return KeyCodes(torch.cat(packed, -1), bits, keys.shape[2], keys.shape[3])


def values_to_codes(values: Tensor, bits: int) -> ValueCodes:
    """(B, Hkv, P, Dv) per token."""
    return ValueCodes(to_rows(values, bits), bits, values.shape[-1])


def to_rows(x: Tensor, bits: int) -> Tensor:
    """(..., n) -> (..., row_bytes(n)) uint8."""
    most, wide = 2**bits - 1, x.float()
    low = wide.amin(-1, keepdim=True).half()
    step = ((wide.amax(-1, keepdim=True) - low) / most).clamp(min=1e-6).half()
    codes = ((wide - low) / step).round().clamp(0, most).to(torch.uint8)
    codes = F.pad(codes, (0, -x.shape[-1] % (16 // bits)))
    codes = codes.view(*x.shape[:-1], codes.shape[-1] * bits // 8, 8 // bits)
    packed = reduce(torch.bitwise_or, (codes[..., i] << bits * i for i in range(8 // bits)))
    return torch.cat([packed, torch.cat([step, low], -1).view(torch.uint8)], -1)


def from_rows(rows: Tensor, bits: int) -> Tensor:
    """(..., bytes) uint8 -> (..., n) float32, n as it was filled up."""
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_unpack", None)
    if rows.device.type == "cpu" and unpack is not None:
        found: Tensor = unpack(rows.reshape(-1, rows.shape[-1]).contiguous())
        return found.view(*rows.shape[:-1], -1)
    return unpacked(rows, bits)


def unpacked(rows: Tensor, bits: int) -> Tensor:
    """`from_rows` in tensor operations."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    codes: Tensor = (rows[..., :-RANGE_BYTES, None] >> shifts) & (2**bits - 1)
    ranges: Tensor = rows[..., -RANGE_BYTES:].contiguous().view(torch.float16).float()
    found: Tensor = codes.flatten(-2) * ranges[..., :1] + ranges[..., 1:]
    return found


def row_bytes(numbers: Count, bits: int) -> Count:
    """Bytes of a row of so many numbers, or of several rows of other lengths."""
    return 2 * ((numbers * bits + 15) // 16) + RANGE_BYTES


def key_bytes(tokens: Count, dim: int, bits: int) -> Count:
    """Bytes of the keys of so many tokens in a KV head, `dim` numbers each."""
    whole, rest = tokens // GROUP, tokens % GROUP
    return dim * (whole * row_bytes(GROUP, bits) + row_bytes(rest, bits) * (rest > 0))


def code_bytes(tokens: Tensor, dims: tuple[int, int], bits: int) -> Tensor:
    """Bytes of the keys and values of so many tokens (B,) in a KV head."""
    return key_bytes(tokens, dims[0], bits) + tokens * row_bytes(dims[1], bits)


def one_more(dims: tuple[int, int], bits: int) -> float:
    """Bytes that one more token's key and value take, where its group has a range already."""
    return sum(dims) * bits / 8 + RANGE_BYTES


def code_share(dim: int, bits: int, itemsize: int) -> float:
    """Bytes of codes over those of full keys and values of `dim` numbers each, of many tokens."""
    ranges = RANGE_BYTES * (1 / GROUP + 1 / dim) / 2
    return (bits / 8 + ranges) / itemsize


def _share(numbers: int) -> int:
    """How many of something of so many numbers make a block."""
    return max(1, BLOCK // numbers)
