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
    device: of the engine's tables. The host does not wait for it
    """

    def __init__(
        self,
        rows: tuple[PrunedRequest | None, ...],
        groups: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows = rows
        self.empty = not any(rows)
        if self.empty:
            return
        nothing = PrunedRequest((0,) * groups, ((),) * groups)
        requests = [row or nothing for row in rows]
        freed = torch.tensor([request.freed for request in requests], dtype=torch.int32)
        self.freed = freed.T.contiguous()
        self.freed_there = to_device(self.freed, device)
        self.index: dict[int, Tensor] = {}
        most = max(len(blocks) for request in requests for blocks in request.fresh)
        fresh = torch.full((groups, len(rows), most), -1, dtype=torch.int32)
        for row, request in enumerate(requests):
            for group, blocks in enumerate(request.fresh):
                fresh[group, row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.fresh = to_device(fresh, device)

    def apply(self, group: int, table: Tensor) -> Tensor:
        """The table of a group without freed blocks, (P, W).

        table: (P, W) int32, the engine's table. Its rows after the R of the batch are padding, and
            stay
        """
        width = table.shape[1]
        if group not in self.index:
            index = torch.arange(width, device=table.device) + self.freed_there[group][:, None]
            self.index[group] = index.clamp_(max=width - 1)
        padding = table[len(self.rows) :]
        shifted = table[: len(self.rows)].gather(1, self.index[group])
        fresh = self.fresh[group]
        if fresh.shape[1]:
            head = shifted[:, : fresh.shape[1]]
            head.copy_(torch.where(fresh >= 0, fresh, head))
        return torch.cat([shifted, padding]) if len(padding) else shifted

    def shorten(self, group: int, block: int, lengths: Tensor) -> Tensor:
        """The lengths (P,) of sequences without the tokens of freed blocks.

        lengths: (P,), on the host or on the device; those of padding stay
        block: tokens per block
        """
        freed = self.freed if lengths.device.type == "cpu" else self.freed_there
        left = lengths.clone()
        left[: len(self.rows)] -= block * freed[group]
        return left


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a small tensor from the host to a device, for which the host does not wait."""
    if torch.device(device).type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
