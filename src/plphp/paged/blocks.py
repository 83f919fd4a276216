"""The blocks that a request holds, reserves and gives back in one cache group.

A prompt is pruned into fresh blocks, so that its unpruned ones can stay in a prefix cache, or in
place. Blocks are of any type here: an engine's objects in its scheduler, their ids in its workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import torch

from plphp.paged.prompts import Runs, spans_of
from plphp.policy import CachePolicy

T = TypeVar("T")


@dataclass(frozen=True)
class PromptBlocks:
    """How the blocks of one prompt are handled.

    length: number of tokens of the prompt
    fresh: number of blocks to reserve in every group, into which the kept tokens are written. None:
        the prompt is pruned in place, and the prefix cache is neither read nor filled for it
    """

    length: int
    fresh: int | None

    def cacheable(self, tokens: int) -> int:
        """The number of tokens, of `tokens` computed ones, that the prefix cache may hold."""
        return 0 if self.fresh is None else min(tokens, self.length)

    def to_reserve(self, tokens: int) -> int:
        """The number of fresh blocks to reserve before a request grows to `tokens` tokens."""
        return self.fresh or 0 if tokens >= self.length else 0


class Lockstep:
    """Whether a request has slots for more tokens, in groups whose tables have equal lengths.

    All groups need as many blocks as the first group, whose tables answer for all of them.

    held: the block table of the first group, by request id
    block_size: tokens per block
    """

    def __init__(self, held: Mapping[str, Sized], block_size: int) -> None:
        self.held = held
        self.block_size = block_size

    def has_slots(self, request_id: str, tokens: int) -> bool:
        """Whether the blocks that a request holds have slots for `tokens` tokens."""
        held = self.held.get(request_id)
        return held is not None and len(held) * self.block_size >= tokens


def fresh_blocks(policy: CachePolicy, images: Runs, length: int, block: int) -> int:
    """The most fresh blocks that a group can need for a prompt.

    images: the runs of vision tokens; length: tokens of the prompt; block: tokens per block
    """
    most = torch.tensor([policy.highest_rate], dtype=torch.float64)
    spans = spans_of(images, length)
    quota, total = policy.rounded_counts(most, spans[None], block)
    kept = int((quota.sum(-1) if total is None else total)[0])
    return length // block - (int((spans > 0).sum()) - kept) // block


def fits(tokens: int, fresh: int, block: int, tables: int, pool: int) -> bool:
    """Whether a request of `tokens` tokens fits into a pool, with one block more in every table.

    fresh: number of fresh blocks of all groups; tables: number of block tables of a request
    pool: number of blocks that the pool has in all
    """
    return (-(-tokens // block) + 1) * tables + fresh <= pool


def in_use(fresh: Sequence[T], full: int, freed: int) -> Sequence[T]:
    """The reserved blocks of one group that the pruned prompt uses.

    fresh: the reserved blocks
    full: number of full blocks of the unpruned prompt
    freed: number of full blocks that the pruned prompt does not need
    """
    return fresh[len(fresh) - (full - freed) :] if 0 < freed < full else fresh[:0]


def pruned_table(
    held: Sequence[T], fresh: Sequence[T], full: int, freed: int, null: T
) -> tuple[list[T], list[T]]:
    """The block table of a pruned prompt, and the blocks to give back, in this order.

    The last block of the prompt is given back before the first one, so that the prompt's beginning
    stays in a prefix cache for the longest time.

    held: the table of the unpruned prompt; null: the entry that stands for a freed block; others as
    in `in_use`
    """
    used = list(in_use(fresh, full, freed))
    gone = freed + len(used)
    unused = fresh[: len(fresh) - len(used)]
    return [null] * freed + used + list(held[gone:]), [*unused, *reversed(held[:gone])]
