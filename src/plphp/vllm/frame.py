"""Block tables of a batch in which some requests are pruned, for all cache groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.vllm.messages import PromptEnd, in_use


@dataclass(frozen=True, eq=False)
class Live:
    """Where a pruned request's tokens are.

    dead: per group, leading blocks of its table that hold nothing any more
    fresh: per group, the blocks that stand in the table after those, if it was not pruned in place
    """

    dead: tuple[int, ...]
    fresh: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(dead: tuple[int, ...], end: PromptEnd, block_size: int) -> Live:
        """After a prompt was pruned."""
        full, fresh = end.length // block_size, end.fresh or ((),) * len(dead)
        used = (in_use(blocks, full, gone) for blocks, gone in zip(fresh, dead, strict=True))
        return Live(dead, tuple(tuple(blocks) for blocks in used))


class Frame:
    """What has to change in the tables of a batch; it is kept as long as the batch stays."""

    def __init__(self, rows: tuple[Live | None, ...], groups: int) -> None:
        """rows: one entry per row of the batch, None for a request that is not pruned."""
        self.rows = rows
        self.empty = not any(rows)
        if self.empty:
            return
        nothing = Live((0,) * groups, ((),) * groups)
        lives = [row or nothing for row in rows]
        self.dead = torch.tensor([live.dead for live in lives], dtype=torch.int32).T.contiguous()
        self.index: dict[int, Tensor] = {}
        most = max(len(blocks) for live in lives for blocks in live.fresh)
        self.fresh = torch.full((groups, len(rows), most), -1, dtype=torch.int32)
        for row, live in enumerate(lives):
            for group, blocks in enumerate(live.fresh):
                self.fresh[group, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def apply(self, group: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """A group's table (R, W) as attention reads it, and its dead blocks (R,) int32."""
        width, dead = table.shape[1], self.dead[group]
        if group not in self.index:
            index = torch.arange(width) + dead[:, None]
            self.index[group] = index.clamp_(max=width - 1)
        shifted = table[: len(self.rows)].gather(1, self.index[group])
        fresh = self.fresh[group]
        if fresh.shape[1]:
            head = shifted[:, : fresh.shape[1]]
            head.copy_(torch.where(fresh >= 0, fresh, head))
        return shifted, dead
