"""Reading keys and values from the paged cache of a dense layer, whatever the attention backend.

Since vLLM 0.32 such a cache is (blocks, Hkv, block_size, 2 D) for every backend, although memory
is ordered differently. Keys are the first D channels of a token, and values the last D. Only
CPU_ATTN has another order inside a block. The order is therefore measured: numbered elements are
written with the backend's own kernel, and the memory shows where each number was stored. A layout
that no reader understands then stops the engine instead of changing tokens.

Writing needs no code here, because every backend of vLLM has `do_kv_cache_update`.

Reads in vLLM: the memory of a layer's cache, because no backend of vLLM has a function for it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN", "FLASHINFER")
BASE = 128  # every dtype of a cache represents the integers below this exactly


class Reader(Protocol):
    """A function that reads the keys and values of one layer."""

    def __call__(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (Hkv, n * block_size, D) of blocks (n,), in the order of `blocks`."""


def reader_of(layer: Any) -> Reader:
    """The reader of a layer, vLLM's Attention, whose cache has been allocated.

    Raises RuntimeError if the backend does not store each element of a block once.
    """
    block, width = layer.kv_cache.shape[2:]
    keys, values = _learn_order(layer)
    plain = torch.arange(block * width, device=keys.device).view(block, 2, width // 2)
    if keys.equal(plain[:, 0].flatten()) and values.equal(plain[:, 1].flatten()):
        return read_plain
    return ordered_reader(keys, values, width // 2)


def read_plain(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The `Reader` of a cache whose tokens hold their key and then their value."""
    keys, values = cache[blocks].transpose(0, 1).flatten(1, 2).chunk(2, -1)
    return keys, values


def ordered_reader(keys: Tensor, values: Tensor, width: int) -> Reader:
    """The reader of a cache with an order of its own inside a block.

    keys, values: (block * D,), the offset of each element in a block's memory; width: D
    """

    def read(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        raw = cache[blocks].flatten(2)  # (n, Hkv, block_size * 2 D)

        def tokens(order: Tensor) -> Tensor:
            part: Tensor = raw[..., order].view(*raw.shape[:2], -1, width)
            return part.transpose(0, 1).reshape(raw.shape[1], -1, width)

        return tokens(keys), tokens(values)

    return read


def _learn_order(layer: Any) -> tuple[Tensor, Tensor]:
    """The offset in a block's memory of each element of keys and of values, (block * D,) int64.

    An offset may exceed what the cache's dtype represents, so the numbers are written digit by
    digit, in base `BASE`.
    """
    cache = torch.zeros_like(layer.kv_cache[:1])
    heads, block, width = cache.shape[1:]
    slots = torch.arange(block, device=cache.device)
    number = torch.arange(block * width, device=cache.device).view(2, block, 1, width // 2)
    found, scale = torch.zeros_like(number.flatten()), 1
    while scale < block * width:
        digit = (number // scale % BASE).to(cache.dtype).expand(-1, -1, heads, -1).contiguous()
        layer.impl.do_kv_cache_update(layer, *digit, cache, slots)
        found += cache[0, 0].flatten().long() * scale
        scale *= BASE
    if not torch.equal(found.sort().values, number.flatten()):
        backend = layer.attn_backend.get_name()
        raise RuntimeError(f"a cache of {backend} does not store each element of a block once")
    keys, values = found.argsort().view(2, -1)
    return keys, values
