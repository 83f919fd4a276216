"""VisionZip (Yang et al. 2024, arXiv 2412.04467): the vision tower chooses, and merges the rest.

    a[j]       = mean over heads of the attention that the class token pays to patch j; in a tower
                 without class token the mean over all patches i of that which i pays to j
    dominant   = the D patches of an image with the highest a
    targets    = C of the other patches R, one in every floor(|R| / C)
    merge      = every other patch of R goes to the target with the most similar key
    f[t]       = f[t] + mean of f over the patches that go to t,  for every target t
    keep       = all text, the dominant patches and the targets, in every layer

D + C = ceil(budget |V_i| - 1e-6), and C = round(contextual (D + C)). a, the keys (averaged over
heads) and the features f are those of the tower layer whose output the projector gets, and f is
changed before the projector. These are the formulas of the authors' program; the paper speaks of
averages where it adds. Its models also keep the class token, which transformers' LLaVA drops.
Tokens keep their order and positions, where the authors number them anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.checks import check_share
from plphp.policy.hidden import HiddenPolicy, HiddenView, TowerView, unit


@dataclass(frozen=True)
class VisionZip(HiddenPolicy):
    """The patches that the tower attends to enter, and the others merge (arXiv 2412.04467).

    budget: the share of each image's tokens that stays, 0 to 1
    contextual: the share of these that others are merged into, 0 to 1; the paper's is 10 of 64
    min_tokens: the number of tokens that stay of each image at least
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.5
    contextual: float = 10 / 64
    min_tokens: int = 1
    reads_tower = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("contextual", self.contextual)

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        assert view.stays is not None
        return view.stays.float()

    def quotas(self, view: HiddenView, quota: Tensor) -> Tensor:
        assert view.stays is not None
        return steps.image_sizes(torch.where(view.stays, view.spans, 0))

    def condense(self, seen: TowerView) -> tuple[Tensor, Tensor]:
        patches = seen.attention.shape[1]
        rate = torch.tensor([self.budget], dtype=torch.float64)
        kept = int(steps.share(rate, torch.tensor([[patches]])))
        kept = max(kept, min(self.min_tokens, patches))
        targets = round(self.contextual * kept)
        order = seen.attention.argsort(dim=-1, descending=True, stable=True)
        dominant = order[:, : kept - targets]
        rest = order[:, kept - targets :].sort(dim=-1).values
        stays = torch.zeros_like(seen.attention, dtype=torch.bool).scatter_(1, dominant, True)
        if not targets:
            return stays, seen.features
        places = torch.arange(rest.shape[1], device=rest.device)
        step = rest.shape[1] // targets
        chosen = (places % step == 0) & (places < step * targets)
        into, merged = rest[:, chosen], rest[:, ~chosen]
        return stays.scatter_(1, into, True), merge(seen, into, merged)


def merge(seen: TowerView, into: Tensor, merged: Tensor) -> Tensor:
    """The features (I, M, E), with those of `merged` added to the most similar of `into`.

    into: (I, C) int64 and merged: (I, R) int64, indices of patches
    """
    keys, full = unit(seen.keys), seen.features.float()
    alike = rows(keys, merged) @ rows(keys, into).transpose(1, 2)
    goes = torch.nn.functional.one_hot(alike.argmax(-1), into.shape[1]).float()
    counts = goes.sum(1).clamp(min=1)[..., None]
    new = rows(full, into) + goes.transpose(1, 2) @ rows(full, merged) / counts
    every = into[..., None].expand(-1, -1, full.shape[-1])
    return seen.features.scatter(1, every, new.to(seen.features.dtype))


def rows(tensor: Tensor, index: Tensor) -> Tensor:
    """The rows (I, K, E) of (I, M, E) with these indices (I, K)."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[-1]))
