"""Copies of rows between main memory and the device, and the choice of the best rows."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def largest(scores: Tensor, k: int, ordered: bool) -> Tensor:
    """The indices (..., k) int64 of the k largest scores (..., V) float32.

    ordered: whether the largest comes first. If not, numpy is used on the CPU, which takes a
        quarter of the time of topk
    """
    if ordered or scores.device.type != "cpu":
        return scores.topk(k, sorted=ordered).indices
    rest = scores.shape[-1] - k
    return torch.from_numpy(np.argpartition(scores.detach().numpy(), rest, -1)[..., rest:])


def exchanges(best: Tensor, held: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which slots take which tokens, so that the tokens `best` are resident instead of `held`.

    best, held: (lines, k) int64, numbers of tokens below `tokens`, or `tokens` for none
    Returns the line, the slot and the new token of every exchange, each (n,) int64, by lines. The
    host waits for the device, because n depends on the numbers.
    """
    none = torch.zeros(len(best), tokens + 1, dtype=torch.bool, device=best.device)
    wanted, resident = (none.scatter(1, x, True) for x in (best, held))
    # Every line loses as many tokens as it gets, so both lists have the same order of lines.
    old = (~wanted.gather(1, held)).flatten().nonzero()[:, 0]
    new = (wanted & ~resident).flatten().nonzero()[:, 0]
    line = old // held.shape[-1]
    return line, old % held.shape[-1], new - line * (tokens + 1)


def to_host(x: Tensor) -> Tensor:
    """A tensor in main memory; pinned if it comes from a GPU, which can then copy from it."""
    if x.device.type != "cuda":
        return x.cpu()
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)


def whole_rows(x: Tensor) -> Tensor:
    """A contiguous tensor (..., D) as a matrix, with elements of 16 bytes if its rows allow that.

    PyTorch's indexed copies work element by element on the CPU, so large elements are faster.
    """
    rows = x.view(-1, x.shape[-1])
    wide = rows.shape[1] * x.element_size() % 16 == 0
    return rows.view(torch.complex128) if wide else rows


def fetch(parked: Tensor, lines: Tensor, device: torch.device) -> Tensor:
    """Copy rows of a matrix in main memory to the device. lines: (n,) int64, their indices."""
    if device.type != "cuda":
        return parked.index_select(0, lines).to(device)
    staged = torch.empty(len(lines), parked.shape[1], dtype=parked.dtype, pin_memory=True)
    torch.index_select(parked, 0, lines, out=staged)
    return staged.to(device, non_blocking=True)
