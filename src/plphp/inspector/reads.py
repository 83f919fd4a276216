"""The vision tokens that recall read at each step of an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from plphp.hf.attention_probe import kept_and_dropped
from plphp.inspector.gather import mask_bits
from plphp.report import Report, Seen

Log = Sequence[Sequence[Tensor]]  # as `PrunedCache.recalled()`
PUNCTUATION = len('[""], ')  # the most that JSON adds to a mask: a layer with a single head


def all_read(report: Report, seen: Seen) -> Report:
    """The report with all vision tokens as kept that entered a layer, for homes that read all."""
    vision = seen.vision(0)
    layers = []
    for layer in report.layers:
        entered = report.entered(layer.layer)
        every = vision if entered is None else entered[0]
        layers.append(replace(layer, kept=every.expand(1, layer.kept.shape[1], -1)))
    return replace(report, layers=tuple(layers))


def looks(report: Report, seen: Seen, log: Log, steps: int) -> Iterator[dict[int, Tensor]]:
    """For each step, layer -> groups of columns, as `kept_and_dropped` returns them.

    Columns that were read count as kept. For a layer without a log, these are the columns that the
    report says were kept.
    """
    layers = [a for a in report.layers if a.kept.shape[1]]
    for step in range(steps):
        now = [replace(a, kept=log[a.layer][step]) if log and log[a.layer] else a for a in layers]
        yield {a.layer: kept_and_dropped(a, seen, report.entered(a.layer)) for a in now}


def masks(log: Log, seen: Seen, byte_limit: int) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Masks of every step, layer and KV head, for the first steps that fit into `byte_limit`."""
    vision = seen.vision(0)
    heads = sum(layer[0].shape[1] for layer in log if layer)
    if not heads:
        return ()
    each = heads * (len(mask_bits(torch.zeros(len(vision)))) + PUNCTUATION)
    steps = min(max(map(len, log)), byte_limit // each)
    return tuple(
        tuple(_masks(layer[step][0], vision) if layer else () for layer in log)
        for step in range(steps)
    )


def _masks(read: Tensor, vision: Tensor) -> tuple[str, ...]:
    """One mask per KV head. read (Hkv, k) and vision (V,) are positions."""
    return tuple(mask_bits(torch.isin(vision, head)) for head in read)
