"""DART (Wen et al. 2025, arXiv 2502.11494): tokens that duplicate a pivot leave before layer K.

    pivots = of each image the P tokens, and of the text after it the Q tokens, with the largest
             || k ||_1, k the keys of layer K - 1 over all KV heads
    keep   = all text, the P pivots of the image, and for every pivot p in turn an equal part of the
             rest: the tokens with the smallest cos(x_p, x_j), x the hidden states before layer K

ceil(keep |V_i| - 1e-6) tokens of each image stay; the first pivots take one more where the rest
cannot be divided. The authors' programs (K = 2, 4 + 4 pivots) drop a token that several pivots name
from the later ones, as here, and apply the model's last norm to x before the cosine, which is not
done here. Attention is not read, so that the kernels of the model stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy.base import check_early, layer_within, share_after
from plphp.policy.checks import check_count
from plphp.policy.hidden import HiddenPolicy, HiddenView, by_order, images, unit


@dataclass(frozen=True)
class DART(HiddenPolicy):
    """A share of each image stays from layer K on, by duplication to pivots (2502.11494).

    layer: K, the first layer that does not compute the dropped tokens, at least 1
    keep: the share of each image's tokens that stays from layer K on, 0 to 1; .5 by default
    budget: the share of vision K/V kept over all layers, in place of `keep`; at least K / layers
    min_tokens: the number of tokens that stay of each image at least
    pivots, text_pivots: P and Q
    Raises InputError, naming the field. A budget below K / layers is refused when a model is
    attached, because the number of layers is not known before.
    """

    layer: int = 2
    keep: float | None = None
    budget: float | None = None  # type: ignore[assignment]  # None stands for `keep`
    min_tokens: int = 1
    pivots: int = 4
    text_pivots: int = 4
    reads_keys = True

    def __post_init__(self) -> None:
        check_early(self.layer, self.keep, self.budget)
        check_count("min_tokens", self.min_tokens, 0)
        check_count("pivots", self.pivots, 1)
        check_count("text_pivots", self.text_pivots, 0)

    def leave_at(self, layers: int) -> int:
        return layer_within(self.layer, self.budget, layers)

    def share(self, layers: int) -> float:
        return share_after(self.layer, self.keep, self.budget, layers)

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        assert view.key_sizes is not None
        size = view.key_sizes
        states = unit(view.hidden)
        scores = torch.zeros(view.spans.shape, device=view.spans.device)
        for rows, columns in images(view.spans):
            for row, own in zip(rows[:, 0].tolist(), columns, strict=True):
                after = (view.spans[row] == 0).nonzero()[:, 0]
                later = after[after > own[-1]]
                text = largest(size[row], later if len(later) else after, self.text_pivots)
                count = int(quota[row, view.spans[row, own[0]] - 1])
                chosen = self.chosen(states[row], size[row], own, text, count)
                scores[row, own] = by_order(chosen[None], len(own))[0]
        return scores

    def chosen(self, states: Tensor, size: Tensor, own: Tensor, text: Tensor, count: int) -> Tensor:
        """The tokens of one image that stay, (count,) int64 indices into `own`.

        states: (N, E) unit vectors; size: (N,) of the keys; own: (M,) columns of the image; text:
        columns of the text pivots
        """
        pivots = largest(size, own, min(self.pivots, count))
        free = torch.ones(len(own), dtype=torch.bool, device=own.device)
        kept = [torch.isin(own, pivots).nonzero()[:, 0]]
        free[kept[0]] = False
        every, rest = torch.cat([pivots, text]), count - len(pivots)
        alike = states[every] @ states[own].T
        for number, row in enumerate(alike):
            part = rest // len(every) + (number < rest % len(every))
            kept.append(row.masked_fill(~free, torch.inf).argsort(stable=True)[:part])
            free[kept[-1]] = False
        return torch.cat(kept)


def largest(size: Tensor, columns: Tensor, count: int) -> Tensor:
    """The `count` of the columns with the largest size (N,), or all if there are fewer."""
    return columns[size[columns].argsort(descending=True, stable=True)[:count]]
