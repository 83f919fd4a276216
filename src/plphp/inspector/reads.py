"""What recall read of the images while an answer was written, as the page shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plphp.hf.attention_probe import kept_and_dropped
from plphp.inspector.gather import mask_bits
from plphp.report import Report, Seen

Log = Sequence[Sequence[Tensor]]  # as `PrunedCache.recalled()`
PUNCTUATION = len('[""], ')  # of a mask in JSON, where every layer had one head only


def all_read(report: Report, seen: Seen) -> Report:
    """The report of a prompt that is read as a whole at every step: codes on the device."""
    every = seen.positions[0][seen.spans[0] > 0]
    layers = (replace(a, kept=every.expand(1, a.kept.shape[1], -1)) for a in report.layers)
    return replace(report, layers=tuple(layers))


def looks(report: Report, seen: Seen, log: Log, steps: int) -> Iterator[dict[int, Tensor]]:
    """Step by step, layer -> (2, Hkv, N) bool: the columns that were read, and those that were not.

    What the report kept, where the log has nothing of a layer.
    """
    layers = [a for a in report.layers if a.kept.shape[1]]
    for step in range(steps):
        now = [replace(a, kept=log[a.layer][step]) if log and log[a.layer] else a for a in layers]
        yield {a.layer: kept_and_dropped(a, seen) for a in now}


def masks(log: Log, seen: Seen, room: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Masks of every step, layer and KV head, for as many steps as take up to `room` bytes."""
    vision = seen.positions[0][seen.spans[0] > 0]
    heads = sum(layer[0].shape[1] for layer in log if layer)
    if not heads:
        return ()
    each = heads * (len(mask_bits(torch.zeros(len(vision)))) + PUNCTUATION)
    steps = min(max(map(len, log)), room // each)
    return tuple(
        tuple(_masks(layer[step][0], vision) if layer else () for layer in log)
        for step in range(steps)
    )


def _masks(read: Tensor, vision: Tensor) -> tuple[str, ...]:
    """read (Hkv, k), vision (V,): positions."""
    return tuple(mask_bits(torch.isin(vision, head)) for head in read)
