"""Reading keys and values from a paged cache, which is the only code that depends on the backend.

An attention backend is an entry of `READERS`: a function from a layer to a `Reader`. Writing needs
no entry, because every backend of vLLM has `do_kv_cache_update`.

Reads in vLLM: the memory of a layer's cache, because no backend of vLLM has a function for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

BASE = 128  # every dtype of a cache represents the integers below this exactly


class Reader(Protocol):
    """A function that reads the keys and values of one layer."""

    def __call__(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (Hkv, n * block_size, D) of blocks (n,), in the order of `blocks`."""


def cpu_reader(layer: Any) -> Reader:
    """The reader of vLLM's CPU_ATTN backend, whose cache is (blocks, Hkv, block_size, 2 D).

    The order of elements inside a block depends on the CPU's instruction set: keys may be
    transposed in pairs or in tiles. The order is therefore measured: numbered elements are written
    with the backend's own kernel, and the memory shows where each number was stored.
    """
    block, width = layer.kv_cache.shape[2:]
    keys, values = _learn_order(layer)

    def read(cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        raw = cache[blocks].flatten(2)  # (n, Hkv, block_size * 2 D)
        heads = raw.shape[1]

        def tokens(order: Tensor) -> Tensor:
            part: Tensor = raw[..., order].view(len(blocks), heads, block, width // 2)
            return part.transpose(0, 1).reshape(heads, -1, width // 2)

        return tokens(keys), tokens(values)

    return read


READERS: dict[str, Callable[[Any], Reader]] = {"CPU_ATTN": cpu_reader}


def _learn_order(layer: Any) -> tuple[Tensor, Tensor]:
    """The offset in a block's memory of each element of keys and of values, (block * D,) int64.

    An offset may exceed what the cache's dtype represents, so the numbers are written digit by
    digit, in base `BASE`. Raises RuntimeError if an element is stored twice or not at all.
    """
    cache = torch.zeros_like(layer.kv_cache[:1])
    heads, block, width = cache.shape[1:]
    number = torch.arange(block * width).view(2, block, 1, width // 2)
    found, scale = torch.zeros(block * width, dtype=torch.int64), 1
    while scale < block * width:
        digit = (number // scale % BASE).to(cache.dtype).expand(-1, -1, heads, -1).contiguous()
        layer.impl.do_kv_cache_update(layer, *digit, cache, torch.arange(block))
        found += cache[0, 0].flatten().long() * scale
        scale *= BASE
    if not torch.equal(found.sort().values, number.flatten()):
        raise RuntimeError(f"a CPU cache of kind {layer.isa} does not store each element once")
    keys, values = found.argsort().view(2, -1)
    return keys, values
