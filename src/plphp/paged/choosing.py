"""The plans of all layers of one request, computed at the end of its prompt.

A policy scores one layer after the other. Numbers of tokens and plans are then computed for all
layers at once, with the layers of the request as the rows of a batch. Shapes: L layers, H query
heads, Hkv KV heads, N prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from plphp.paged.prompts import Choice, PromptEnd
from plphp.policy import CachePolicy, LayerView, Look
from plphp.policy.base import keep_best


@dataclass(frozen=True)
class Draft:
    """The plans of a prompt whose numbers are still on the device. Its rows are the layers.

    quota: (L, m) int64 and total: (L,) int64, as in `keep_best`
    """

    look: Look
    quota: Tensor
    total: Tensor

    @property
    def numbers(self) -> Tensor:
        """What the host needs, (3, L) float64: kept vision tokens, rates, and classes."""
        return torch.stack([self.total.double(), self.look.rate, self.look.classes.double()])

    def columns(self, choice: Choice, text: int) -> list[Tensor]:
        """The kept columns of every layer, (Hkv, K) each. The host does not read.

        choice: the numbers of this draft; text: number of tokens that are not vision tokens
        """
        counts = [text + kept for kept in choice.kept]
        extent = min(counts), max(counts)
        plan = keep_best(self.look, self.look.rate, self.quota, self.total, extent)
        return [
            row[:, extent[1] - count :] for row, count in zip(plan.columns, counts, strict=True)
        ]


def draft(
    views: Iterable[LayerView], policy: CachePolicy, block: int, layers_per_group: int
) -> Draft:
    """The plans of all layers. The host does not read.

    views: one per layer, of one row each. A view is read before the next one is made, so that the
        keys and values of one layer are in memory at a time
    block: tokens per block; the number of dropped tokens is a multiple of it
    layers_per_group: number of consecutive layers that share a block table. Each of them selects
        its own tokens, but keeps as many as the layer of the group that keeps the most
    """
    look = _of_all_layers([policy.look(view) for view in views])
    quota, total = policy.rounded_counts(look.rate, look.spans, block)
    total = quota.sum(-1) if total is None else total
    most = total.view(-1, layers_per_group).amax(1).repeat_interleave(layers_per_group)
    return Draft(look, quota, most)


def settle(
    drafts: Sequence[Draft], ends: Sequence[PromptEnd], block: int, layers_per_group: int
) -> list[Choice]:
    """The numbers that a scheduler needs. The host reads from the device once, for all drafts.

    ends: the prompts of the drafts; block, layers_per_group: as in `draft`
    """
    numbers = torch.stack([one.numbers for one in drafts]).tolist() if drafts else []
    choices = []
    for (kept, rates, classes), end in zip(numbers, ends, strict=True):
        vision = end.length - end.text
        choices.append(
            Choice(
                freed=tuple((vision - int(n)) // block for n in kept[::layers_per_group]),
                kept=tuple(int(n) for n in kept),
                rates=tuple(rates),
                classes=tuple(int(n) for n in classes),
            )
        )
    return choices


def choose_again(view: LayerView, policy: CachePolicy, rate: float, kept: int, text: int) -> Tensor:
    """The columns (Hkv, K) that one layer keeps of a request that was preempted.

    view: of the layer, with one row
    rate, kept: the layer's retention rate and number of vision tokens before the preemption. With
        these given, no other layer and no other tensor-parallel rank is needed, and the host does
        not read
    text: number of tokens of the prompt that are not vision tokens
    """
    look = policy.look(view)
    rates = torch.full((1,), rate, dtype=torch.float64, device=view.probs.device)
    quota, _ = policy.counts(rates, look.spans)
    total = quota.new_full((1,), kept)
    return keep_best(look, rates, quota, total, (text + kept, text + kept)).columns[0]


def _of_all_layers(looks: list[Look]) -> Look:
    """One look whose rows are the layers."""
    # `places` is None: in a paged cache every column of the prompt enters every layer.
    names = [f.name for f in fields(Look) if getattr(looks[0], f.name) is not None]
    return Look(**{name: torch.cat([getattr(look, name) for look in looks]) for name in names})
