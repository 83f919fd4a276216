"""Tensors at fixed addresses, for engines that replay a decoding step as one full CUDA graph.

Such a graph reads its inputs where they were when it was recorded, and calls no Python code. So the
lengths and block tables of a step are copied to where the graph reads them. Each attention also
copies its queries, because a prompt may end inside a graph: its last chunk may be a single token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class FixedTensors:
    """The tensors of one worker. None of them is ever allocated again.

    rows: the most rows of a step that is recorded or replayed
    queries: by layer name, (rows, H, D), what `keep` has copied; allocated by the caller, because a
        graph is not allowed to
    """

    def __init__(self, rows: int, queries: Mapping[str, Tensor]) -> None:
        self.rows = rows
        self.queries = queries
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def place(self, group: int, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the lengths (P,) and the table (P, W) of a cache group, at fixed addresses.

        The tensors of a step with more than `rows` rows, which no graph replays, are returned as
        they are.
        """
        count = len(lengths)
        if count > self.rows:
            return lengths, table
        if group not in self.tables:
            made = lengths.new_zeros(self.rows), table.new_zeros(self.rows, table.shape[1])
            self.tables[group] = made
        fixed_lengths, fixed_table = (part[:count] for part in self.tables[group])
        return fixed_lengths.copy_(lengths), fixed_table.copy_(table)

    def keep(self, layer: str, query: Tensor) -> None:
        """Copy the queries (T, H, D) of a step with at most `rows` tokens. A graph records this."""
        if len(query) <= self.rows:
            self.queries[layer][: len(query)].copy_(query)


def query_buffers(
    shapes: Mapping[str, tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Buffers for `FixedTensors.queries`. shapes: (H, D) by layer name."""
    return {
        name: torch.zeros(rows, heads, width, dtype=dtype, device=device)
        for name, (heads, width) in shapes.items()
    }
