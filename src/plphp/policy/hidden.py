"""Base class of the sequence methods that choose from the hidden states before a layer.

FastV chooses by the attention of a layer. These methods read the hidden states themselves, or, as
VTW, nothing at all. Before layer 0 the hidden states are the embeddings of the text, with the
projected features of the images in the places of the vision tokens. Tokens dropped there are
computed in no layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.base import Look, SequencePolicy
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import KeepPlan, LayerView, pack


@dataclass(frozen=True)
class HiddenView:
    """What a method sees of a prompt before one layer. N columns, padding included.

    hidden: (B, N, E), the hidden states that the layer would be given, in the model's dtype
    spans: (B, N) int64, 0 text, i > 0 the i-th image or video, -1 padding
    layers: number of layers of the decoder
    key_sizes: (B, N) float32, the sum of the absolute values of each key in the layer before, over
        all KV heads, up to a factor; None for a method that does not read them
    stays: (B, N) bool, the tokens that the method has chosen in the vision tower; None for other
        methods
    frames: (B, N) int64, the frame of its video that a vision token shows, 0 for other tokens;
        None for a method that does not read them
    """

    hidden: Tensor
    spans: Tensor
    layers: int = 1
    key_sizes: Tensor | None = None
    stays: Tensor | None = None
    frames: Tensor | None = None


@dataclass(frozen=True)
class TowerView:
    """What a vision tower gave for I images of M patches each.

    features: (I, M, E), the input of the projector
    attention: (I, M) float32, the attention that the class token pays to each patch, or without a
        class token that which all patches pay to it, averaged over heads
    keys: (I, M, D) float32, the key of each patch, averaged over heads
    """

    features: Tensor
    attention: Tensor
    keys: Tensor


class HiddenPolicy(SequencePolicy):
    """A sequence method that chooses from hidden states. A subclass implements `scores`.

    budget: the share of each image's vision tokens that stays
    min_tokens: the number of tokens that stay of each image at least
    """

    budget: float
    min_tokens: int
    reads_hidden = True  # whether `view.hidden` is read
    reads_frames = False  # whether `view.frames` is read
    reads_keys = False  # whether `view.key_sizes` is read
    reads_tower = False  # whether it chooses in the vision tower, and reads `view.stays`

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_count("min_tokens", self.min_tokens, 0)

    def leave_at(self, layers: int) -> int:
        """The layer before which the tokens are dropped, 0 by default."""
        return 0

    def share(self, layers: int) -> float:
        """The share of the vision tokens that stays from layer `leave_at` on."""
        return self.budget

    def scores_layer(self, layer: int, layers: int) -> bool:
        """No layer's attention is read."""
        return False

    def look(self, view: LayerView) -> Look:
        """Not used: there is no attention to look at."""
        raise NotImplementedError

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        """The score of each column, (B, N) float32; in each image the highest stay.

        quota: (B, m) int64, how many tokens stay of each image
        """
        raise NotImplementedError

    def condense(self, seen: TowerView) -> tuple[Tensor, Tensor]:
        """For a method that reads the tower: which patches stay, (I, M) bool, and the features
        (I, M, E) that the projector gets in place of the tower's.
        """
        raise NotImplementedError

    def choose(self, view: HiddenView) -> KeepPlan:
        """The columns that stay: all text, and of each image its quota of the best tokens.

        The plan is for a single KV head. The host reads from the device: the sizes of the images.
        """
        sizes = steps.image_sizes(view.spans)
        rate = sizes.new_full((len(sizes),), self.share(view.layers), dtype=torch.float64)
        quota = torch.maximum(sizes.clamp(max=self.min_tokens), steps.share(rate, sizes))
        quota = self.quotas(view, quota)
        keep = steps.select(self.scores(view, quota)[:, None], view.spans, quota)
        without = ~(view.spans > 0).any(-1)
        unknown = rate.new_full(rate.shape, torch.nan, dtype=torch.float32)
        classes = torch.full_like(sizes[:, 0], -1)
        return pack(keep, unknown, rate.masked_fill(without, torch.nan), classes)

    def quotas(self, view: HiddenView, quota: Tensor) -> Tensor:
        """How many tokens stay of each image, (B, m) int64. By default `quota`, their shares."""
        return quota


def images(spans: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The vision tokens of the images, images of equal size together, so that one loop serves all.

    spans: (B, N) int64
    Yields (rows, columns): (I, 1) int64 the row of each image, and (I, M) int64 its M columns. The
    host waits for the device once.
    """
    by_size: dict[int, list[tuple[int, int]]] = {}
    for row, sizes in enumerate(steps.image_sizes(spans).cpu().tolist()):
        for number, size in enumerate(sizes, start=1):
            if size:
                by_size.setdefault(size, []).append((row, number))
    for size, found in by_size.items():
        rows = torch.tensor([row for row, _ in found], device=spans.device)[:, None]
        numbers = torch.tensor([number for _, number in found], device=spans.device)[:, None]
        own = (spans[rows[:, 0]] == numbers).to(torch.uint8)
        columns = own.argsort(dim=-1, descending=True, stable=True)[:, :size]
        yield rows, columns


def together(spans: Tensor) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Lists of what `images` yields, in each of which the sizes differ by less than a factor of 2.

    One greedy loop serves all images of a list, once `stacked` has filled them up to one size.
    """
    alike: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for rows, columns in images(spans):
        alike.setdefault(columns.shape[1].bit_length(), []).append((rows, columns))
    yield from alike.values()


def stacked(parts: list[Tensor], fill: float) -> Tensor:
    """Tensors (I, M) or (I, M, M) of several sizes M as one, filled up to the largest M."""
    most = max(part.shape[1] for part in parts)
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_full((sum(map(len, parts)), *[most] * (parts[0].dim() - 1)), fill)
    first = 0
    for part in parts:
        whole[(slice(first, first + len(part)), *map(slice, part.shape[1:]))] = part
        first += len(part)
    return whole


def unit(features: Tensor) -> Tensor:
    """Vectors (..., E) of length 1 in float32, from vectors of any dtype; a zero vector stays 0."""
    return torch.nn.functional.normalize(features.float(), dim=-1)


def most_wanted(group: list[tuple[Tensor, Tensor]], spans: Tensor, quota: Tensor) -> int:
    """The largest number of tokens that an image of a list of `together` keeps.

    quota: (B, m) int64, how many tokens stay of each image. The host waits for the device.
    """
    wanted = [quota[rows, spans[rows, columns[:, :1]] - 1].max() for rows, columns in group]
    return int(torch.stack(wanted).max())


def scatter_order(scores: Tensor, group: list[tuple[Tensor, Tensor]], chosen: Tensor) -> None:
    """Write into scores (B, N) in which order the tokens of a list of images were chosen.

    chosen: (I, C) int64, the images of all parts of the list one after the other
    """
    found = by_order(chosen, max(columns.shape[1] for _, columns in group))
    first = 0
    for rows, columns in group:
        scores[rows, columns] = found[first : first + len(rows), : columns.shape[1]]
        first += len(rows)


def by_order(chosen: Tensor, size: int) -> Tensor:
    """Scores (I, M) float32 of tokens that were chosen one after the other: earlier is higher.

    chosen: (I, C) int64, the tokens in the order of their choice, each at most once; size: M.
    Tokens that were not chosen have the score 0.
    """
    count = chosen.shape[1]
    scores = torch.zeros(len(chosen), size, device=chosen.device)
    order = torch.arange(count, 0, -1, device=chosen.device, dtype=torch.float32)
    return scores.scatter_(1, chosen, order.expand(len(chosen), -1))
