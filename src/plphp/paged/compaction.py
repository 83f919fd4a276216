"""Scoring and compaction of one layer of a prompt whose last token has been computed.

Shapes: H query heads, Hkv KV heads, N prompt tokens, W of them whose queries a method reads, D head
dimension, n blocks of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.attention import attend, window_probabilities
from plphp.policy import LayerView


class PagedLayer:
    """Base class of an engine's decoder layer. A subclass sets the fields, and reads and writes.

    name: the engine's name of the layer
    group: index of its cache group, among those that are pruned
    index: its place among all layers of the decoder
    kv_heads: number of KV heads of this tensor-parallel rank
    scale, softcap: the factor of attention logits, and their soft cap or None
    """

    name: str
    group: int
    index: int

    @property
    def kv_heads(self) -> int:
        raise NotImplementedError

    @property
    def scale(self) -> float:
        raise NotImplementedError

    @property
    def softcap(self) -> float | None:
        raise NotImplementedError

    def read(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (Hkv, n * block_size, D) of blocks (n,), in the order of `blocks`."""
        raise NotImplementedError

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        """Write keys and values (K, Hkv, D) to slots (K,), `block id * block_size + offset`."""
        raise NotImplementedError

    def view(self, queries: Tensor, blocks: Tensor, spans: Tensor) -> LayerView:
        """The input of a policy, with one row.

        queries: (W, H, D) of the last prompt tokens; blocks: (n,) of the prompt
        spans: (N,) int64, as in `LayerView`, on the device of the cache
        """
        keys, values = (part[None, :, : len(spans)] for part in self.read(blocks))
        columns = torch.arange(len(spans), device=keys.device)
        asked = columns[None, len(spans) - len(queries) :]
        visible = columns <= asked[..., None]
        rows = queries.transpose(0, 1)[None]
        probs = window_probabilities(rows, keys, visible, self.scale, self.softcap)
        return LayerView(
            probs=probs[:, :, -1],
            spans=spans[None],
            kv_heads=self.kv_heads,
            window=probs,
            asked=asked,
            keys=keys,
            values=values,
        )

    def gather(self, blocks: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values (Hkv, K, D) at columns (Hkv, K) of a block table (n,)."""
        keys, values = self.read(blocks)
        index = columns[..., None].expand(-1, -1, keys.shape[-1])
        return keys.gather(1, index), values.gather(1, index)

    def attend_kept(self, queries: Tensor, blocks: Tensor, kept: Tensor, length: int) -> Tensor:
        """Attention of the first answer tokens to the kept prompt tokens and to the answer.

        queries: (T, H, D) of the answer tokens, at the columns [length, length + T)
        blocks: (n,) of the unpruned prompt and the answer; kept: (Hkv, K), the kept columns
        length: number of tokens of the prompt
        Returns (T, H, D).
        """
        new = len(queries)
        answer = torch.arange(length, length + new, device=kept.device)
        columns = torch.cat([kept, answer.expand(len(kept), -1)], 1)
        keys, values = self.gather(blocks, columns)
        held = keys.shape[1]
        seen = torch.ones(new, held, dtype=torch.bool, device=kept.device).tril(held - new)
        rows, mask = queries.transpose(0, 1)[None], seen[None, None]
        out = attend(rows, keys[None], values[None], mask, self.scale, self.softcap)
        return out[0].transpose(0, 1)

    def move(self, columns: Tensor, source: Tensor, target: Tensor, first: int, block: int) -> None:
        """Copy the kept tokens to the positions [first, first + K) of a block table.

        columns: (Hkv, K), ascending
        source, target: (n,), the block table to read and the one to write
        block: tokens per block
        """
        keys, values = (part.transpose(0, 1).contiguous() for part in self.gather(source, columns))
        index = torch.arange(first, first + columns.shape[1], device=columns.device)
        self.write(keys, values, target[index // block].long() * block + index % block)


def with_fresh(blocks: Tensor, fresh: Tensor, full: int) -> Tensor:
    """A block table (n,) in which fresh blocks (F,) replace the last of its `full` full blocks."""
    target = blocks.clone()
    target[full - len(fresh) : full] = fresh
    return target
