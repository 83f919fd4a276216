"""The block tables of a batch in which some requests are pruned, for all cache groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.paged.blocks import in_use
from plphp.paged.prompts import PromptEnd


@dataclass(frozen=True, eq=False)
class PrunedRequest:
    """The blocks of a pruned request.

    freed: per group, number of leading blocks of its table that hold no tokens any more
    fresh: per group, the block ids that follow those in the table; empty if the request was pruned
        in place
    """

    freed: tuple[int, ...]
    fresh: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(freed: tuple[int, ...], end: PromptEnd, block_size: int) -> PrunedRequest:
        """The blocks of a request whose prompt has just been pruned."""
        full, fresh = end.length // block_size, end.fresh or ((),) * len(freed)
        used = (
            in_use(blocks, full, released) for blocks, released in zip(fresh, freed, strict=True)
        )
        return PrunedRequest(freed, tuple(tuple(blocks) for blocks in used))


class BatchTables:
    """The changes to an engine's block tables for one batch. They serve until the batch changes.

    rows: one entry per row of the batch, None for a request that is not pruned
    groups: number of cache groups
    """

    def __init__(self, rows: tuple[PrunedRequest | None, ...], groups: int) -> None:
        self.rows = rows
        self.empty = not any(rows)
        if self.empty:
            return
        nothing = PrunedRequest((0,) * groups, ((),) * groups)
        requests = [row or nothing for row in rows]
        freed = torch.tensor([request.freed for request in requests], dtype=torch.int32)
        self.freed = freed.T.contiguous()
        self.index: dict[int, Tensor] = {}
        most = max(len(blocks) for request in requests for blocks in request.fresh)
        self.fresh = torch.full((groups, len(rows), most), -1, dtype=torch.int32)
        for row, request in enumerate(requests):
            for group, blocks in enumerate(request.fresh):
                self.fresh[group, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def apply(self, group: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """The table of a group without freed blocks, (P, W), and their number per row, (R,) int32.

        table: (P, W) int32, the engine's table. Its rows after the R of the batch are padding, and
            stay
        """
        width, freed = table.shape[1], self.freed[group]
        if group not in self.index:
            index = torch.arange(width) + freed[:, None]
            self.index[group] = index.clamp_(max=width - 1)
        padding = table[len(self.rows) :]
        shifted = table[: len(self.rows)].gather(1, self.index[group])
        fresh = self.fresh[group]
        if fresh.shape[1]:
            head = shifted[:, : fresh.shape[1]]
            head.copy_(torch.where(fresh >= 0, fresh, head))
        return torch.cat([shifted, padding]) if len(padding) else shifted, freed
