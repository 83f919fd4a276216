"""Codes: numbers rounded to 4 or 2 bits, row by row (KIVI, Liu et al. 2024, arXiv 2402.02750).

    step = (max - low) / (2^bits - 1)   for each row
    code = round((x - low) / step)

A row of keys is 32 tokens of one channel, because some channels of keys have a much larger range
than others. A row of values is one token.

In memory a row is its codes, the first number in the lowest bits, filled up to a multiple of 16
bits, and then `step` and `low` as float16. PyTorch's quantized embeddings have the same format: on
the CPU their operator decodes rows in one pass over memory. Elsewhere tensor operations are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp._blocks import at_once, rows_in_block
from plphp.cache import take

Count = TypeVar("Count", int, Tensor)

GROUP = 32  # tokens of a channel of the keys that share a range
RANGE_BYTES = 4  # bytes of a range: step and lowest number as float16


@dataclass
class KeyCodes:
    """Codes of keys (B, Hkv, P, D).

    packed: (B, Hkv, bytes) uint8. The bytes of a KV head are the rows (D, P // GROUP, row) of whole
        groups of tokens, and then the rows (D, shorter row) of the last P % GROUP tokens, if any
    bits: 4 or 2; tokens: P; dim: D; group: tokens in a row
    """

    packed: Tensor
    bits: int
    tokens: int
    dim: int
    group: ClassVar[int] = GROUP

    def products(self, query: Tensor) -> Iterator[Tensor]:
        """Products of query (B, Hkv, T, D) float32 and all keys, in blocks along the P tokens.

        Each is (B, Hkv, T, tokens of the block) float32.
        """
        return (query @ block for block in self._blocks())

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded keys (B, Hkv, P, D) in a dtype."""
        return _joined(self.decoded(), self.packed, (self.tokens, self.dim), dtype)

    def decoded(self) -> Iterator[Tensor]:
        """The decoded keys, in blocks (B, Hkv, tokens, D) float32 along the P tokens."""
        return (block.mT for block in self._blocks())

    def _blocks(self) -> Iterator[Tensor]:
        """The decoded keys, in blocks (B, Hkv, D, tokens) float32."""
        lead, (whole, rest) = self.packed.shape[:2], divmod(self.tokens, GROUP)
        last = self.packed[..., self.dim * whole * row_bytes(GROUP, self.bits) :]
        if whole:
            rows = self._groups()
            length = rows_in_block(lead.numel() * self.dim * GROUP)
            for part in torch.split(rows, length, 3):
                yield from_rows(part, self.bits).flatten(3)
        if rest:
            yield from_rows(last.view(*lead, self.dim, -1), self.bits)[..., :rest]

    def through(self, change: Callable[[Tensor], Tensor]) -> KeyCodes:
        """The same codes with the tensor replaced by `change` of it, such as on another device."""
        return replace(self, packed=change(self.packed))

    def followed_by(self, more: KeyCodes) -> KeyCodes:
        """The codes of these tokens, then fillers up to a whole group, and then more tokens.

        Groups keep their ranges: no key is rounded again.
        """
        lead, row = self.packed.shape[:2], row_bytes(GROUP, self.bits)
        parts = [self._groups()]
        if rest := self.tokens % GROUP:
            last = self.packed[..., self.dim * (self.tokens // GROUP) * row :]
            last = last.view(*lead, self.dim, 1, -1)
            filled = last.new_zeros(*last.shape[:-1], row - row_bytes(rest, self.bits))
            parts.append(
                torch.cat([last[..., :-RANGE_BYTES], filled, last[..., -RANGE_BYTES:]], -1)
            )
        groups = torch.cat([*parts, more._groups()], 3).flatten(2)
        short = more.packed[..., self.dim * (more.tokens // GROUP) * row :]
        tokens = self.tokens + self.fillers + more.tokens
        return replace(self, packed=torch.cat([groups, short], -1), tokens=tokens)

    @property
    def fillers(self) -> int:
        """Tokens that the last group lacks to be whole."""
        return -self.tokens % GROUP

    def _groups(self) -> Tensor:
        """The rows (B, Hkv, D, P // GROUP, bytes) of whole groups."""
        whole, row = self.tokens // GROUP, row_bytes(GROUP, self.bits)
        groups = self.packed[..., : self.dim * whole * row]
        return groups.view(*self.packed.shape[:2], self.dim, whole, row)


@dataclass
class ValueCodes:
    """Codes of values (B, Hkv, P, Dv).

    packed: (B, Hkv, P, bytes) uint8, a row for each token
    bits: 4 or 2; dim: Dv
    """

    packed: Tensor
    bits: int
    dim: int

    def read(self, weights: Tensor) -> Tensor:
        """The sum (B, Hkv, T, Dv) float32 of all values, with weights (B, Hkv, T, P) float32."""
        parts = torch.split(weights, self._length(), -1)
        sums = (part @ block for part, block in zip(parts, self.decoded(), strict=True))
        return reduce(torch.add, sums)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded values (B, Hkv, P, Dv) in a dtype."""
        return _joined(self.decoded(), self.packed, (self.packed.shape[2], self.dim), dtype)

    def decoded(self) -> Iterator[Tensor]:
        """The decoded values, in blocks (B, Hkv, tokens, Dv) float32 along the P tokens."""
        for part in torch.split(self.packed, self._length(), 2):
            if not part.shape[2]:
                return
            yield from_rows(part, self.bits)[..., : self.dim]

    def _length(self) -> int:
        """Tokens in a block."""
        return rows_in_block(self.packed.shape[:2].numel() * self.dim)

    def through(self, change: Callable[[Tensor], Tensor]) -> ValueCodes:
        """The same codes with the tensor replaced by `change` of it, such as on another device."""
        return replace(self, packed=change(self.packed))

    def followed_by(self, more: ValueCodes, fillers: int) -> ValueCodes:
        """The codes of these tokens, then of fillers, which are 0, and then of more tokens."""
        empty = self.packed.new_zeros(*self.packed.shape[:2], fillers, self.packed.shape[3])
        return replace(self, packed=torch.cat([self.packed, empty, more.packed], 2))


def keys_to_codes(keys: Tensor, bits: int, slots: Tensor | None = None) -> KeyCodes:
    """Round keys (B, Hkv, P, D), each channel in groups of tokens; the last group may be short.

    slots: (B, Hkv, P) int64, which of keys (B, Hkv, C, D) to round; all without it
    """
    lead, dim = keys.shape[:2], keys.shape[3]
    tokens = keys.shape[2] if slots is None else slots.shape[2]
    packed = keys.new_empty(*lead, key_bytes(tokens, dim, bits), dtype=torch.uint8)
    codes = KeyCodes(packed, bits, tokens, dim)
    groups, whole = codes._groups(), tokens // GROUP
    for begin, part in _parts(keys, slots, GROUP):
        channels, at = part.mT, begin // GROUP
        count = part.shape[2] // GROUP
        rows = channels[..., : count * GROUP].reshape(*channels.shape[:3], count, GROUP)
        if count:
            groups[:, :, :, at : at + count] = to_rows(rows, bits)
        if part.shape[2] % GROUP:
            short = to_rows(channels[..., count * GROUP :], bits)
            packed[..., dim * whole * row_bytes(GROUP, bits) :] = short.flatten(2)
    return codes


def values_to_codes(values: Tensor, bits: int, slots: Tensor | None = None) -> ValueCodes:
    """Round values (B, Hkv, P, Dv), each token by itself. slots: as in `keys_to_codes`."""
    lead, dim = values.shape[:2], values.shape[3]
    tokens = values.shape[2] if slots is None else slots.shape[2]
    packed = values.new_empty(*lead, tokens, row_bytes(dim, bits), dtype=torch.uint8)
    for begin, part in _parts(values, slots):
        packed[:, :, begin : begin + part.shape[2]] = to_rows(part, bits)
    return ValueCodes(packed, bits, dim)


def _parts(x: Tensor, slots: Tensor | None, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Chosen slots of x (B, Hkv, C, D), a few at a time, with the number of the first of them.

    slots: as in `keys_to_codes`; multiple: of which the length of all parts but the last is one

    Rounding takes several copies in float32, which must not be as large as a layer.
    """
    tokens = x.shape[2] if slots is None else slots.shape[2]
    length = at_once(x, x.shape[:2].numel() * x.shape[3] * multiple) * multiple
    for begin in range(0, tokens, length):
        some = slice(begin, begin + length)
        yield begin, x[:, :, some] if slots is None else take(x, slots[:, :, some])


def _joined(
    blocks: Iterator[Tensor], packed: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Blocks (B, Hkv, tokens, D) as one tensor of a dtype. size: P and D; packed: of the codes."""
    every, begin = packed.new_empty(*packed.shape[:2], *size, dtype=dtype), 0
    for block in blocks:
        every[:, :, begin : (begin := begin + block.shape[2])] = block
    return every


def to_rows(x: Tensor, bits: int) -> Tensor:
    """Round rows (..., n) to codes (..., row_bytes(n)) uint8, with the range of each row."""
    most, wide = 2**bits - 1, x.float()
    low = wide.amin(-1, keepdim=True).half()
    step = ((wide.amax(-1, keepdim=True) - low) / most).clamp(min=1e-6).half()
    codes = ((wide - low) / step).round().clamp(0, most).to(torch.uint8)
    codes = F.pad(codes, (0, -x.shape[-1] % (16 // bits)))
    codes = codes.view(*x.shape[:-1], codes.shape[-1] * bits // 8, 8 // bits)
    packed = reduce(torch.bitwise_or, (codes[..., i] << bits * i for i in range(8 // bits)))
    return torch.cat([packed, torch.cat([step, low], -1).view(torch.uint8)], -1)


def from_rows(rows: Tensor, bits: int) -> Tensor:
    """Decode rows (..., bytes) uint8 to (..., n) float32; n includes what fills up a row."""
    unpack = getattr(torch.ops.quantized, f"embedding_bag_{bits}bit_unpack", None)
    if rows.device.type == "cpu" and unpack is not None:
        numbers: Tensor = unpack(rows.reshape(-1, rows.shape[-1]).contiguous())
        return numbers.view(*rows.shape[:-1], -1)
    return unpacked(rows, bits)


def unpacked(rows: Tensor, bits: int) -> Tensor:
    """`from_rows` in tensor operations, for any device."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=rows.device)
    codes: Tensor = (rows[..., :-RANGE_BYTES, None] >> shifts) & (2**bits - 1)
    ranges: Tensor = rows[..., -RANGE_BYTES:].contiguous().view(torch.float16).float()
    numbers: Tensor = codes.flatten(-2) * ranges[..., :1] + ranges[..., 1:]
    return numbers


def row_bytes(numbers: Count, bits: int) -> Count:
    """Bytes of a row of this many numbers. A tensor stands for several rows."""
    return 2 * ((numbers * bits + 15) // 16) + RANGE_BYTES


def key_bytes(tokens: Count, dim: int, bits: int) -> Count:
    """Bytes of the codes of the keys of this many tokens in a KV head. dim: D."""
    whole, rest = tokens // GROUP, tokens % GROUP
    return dim * (whole * row_bytes(GROUP, bits) + row_bytes(rest, bits) * (rest > 0))


def code_bytes(tokens: Tensor, dims: tuple[int, int], bits: int) -> Tensor:
    """Bytes of the codes of keys and values in a KV head. tokens: (B,); dims: D and Dv."""
    return key_bytes(tokens, dims[0], bits) + tokens * row_bytes(dims[1], bits)


def one_more(dims: tuple[int, int], bits: int) -> float:
    """Bytes that one more token adds to a group of keys that is not full. dims: D and Dv."""
    return sum(dims) * bits / 8 + RANGE_BYTES


def code_share(dim: int, bits: int, itemsize: int) -> float:
    """Bytes of codes as a share of those of full keys and values, for many tokens. dim: D = Dv."""
    ranges = RANGE_BYTES * (1 / GROUP + 1 / dim) / 2
    return (bits / 8 + ranges) / itemsize
