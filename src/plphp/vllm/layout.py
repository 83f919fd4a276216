"""Reading keys and values back from a paged cache: the one thing that differs between backends.

A backend is an entry of `READERS`: a function from a layer to a `Reader`. Writing needs none, every
backend of vLLM has `do_kv_cache_update`.

Touches: the memory of a layer's cache, because no backend of vLLM's can read it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

DIGIT = 128  # a number that every dtype of a cache holds exactly


class Reader(Protocol):
    """Gathers tokens of one layer."""

    def __call__(self, cache: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (Hkv, n * block_size, D) of blocks (n,), in their order."""


def cpu_reader(layer: Any) -> Reader:
    """CPU_ATTN: (blocks, Hkv, block_size, 2 D), inside a block as the instruction set likes it.

    Keys may be transposed, in pairs or in tiles, so the order is learned: numbered tokens are
    written with the backend's own kernel, and what comes out says where each number went.
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
    """Flat places (block * D,) in a block's memory of every key's and every value's element."""
    cache = torch.zeros_like(layer.kv_cache[:1])
    heads, block, width = cache.shape[1:]
    number = torch.arange(block * width).view(2, block, 1, width // 2)
    found, scale = torch.zeros(block * width, dtype=torch.int64), 1
    while scale < block * width:
        digit = (number // scale % DIGIT).to(cache.dtype).expand(-1, -1, heads, -1).contiguous()
        layer.impl.do_kv_cache_update(layer, *digit, cache, torch.arange(block))
        found += cache[0, 0].flatten().long() * scale
        scale *= DIGIT
    if not torch.equal(found.sort().values, number.flatten()):
        raise RuntimeError(f"a CPU cache of kind {layer.isa} does not hold every element once")
    keys, values = found.argsort().view(2, -1)
    return keys, values
