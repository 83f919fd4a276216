"""VidCom2 (Liu et al. 2025, arXiv 2505.14454): of each frame the tokens unlike it and the video.

    u      = the unit vectors of x over the half of the dimensions that vary least over the video
    g(v, c)= sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(- || v - c ||^2 / (2 a))
    G[j]   = g(u_j, mean of u over the video),  F[j] = g(u_j, mean of u over the frame of j)
    p[f]   = softmax over frames f of  - (mean over j in f of G[j]) / .01
    r[f]   = budget (1 + p[f] - mean p), at most 1
    keep   = all text, and of each frame f the max(1, round(r[f] |f|)) tokens with the lowest G + F

x are the embeddings of a video's tokens as they enter layer 0. The formulas are those of the
authors' program. A frame that differs from the video keeps more. Rounding in each frame makes the
total differ from the budget by up to half a token a frame. An image is treated as a video of one
frame, and so is a video whose frames plphp cannot tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy import steps
from plphp.policy.hidden import HiddenPolicy, HiddenView, images, unit

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)  # a of the kernels
TEMPERATURE = 0.01


@dataclass(frozen=True)
class VidCom2(HiddenPolicy):
    """A share of each frame enters the language model, more of unusual frames (2505.14454).

    budget: the share of each video's tokens that stays, 0 to 1; the paper's default is .25
    min_tokens: the number of tokens that stay of each frame at least
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.5
    min_tokens: int = 1
    reads_frames = True

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        return self.best(view).float()

    def quotas(self, view: HiddenView, quota: Tensor) -> Tensor:
        chosen = torch.where(self.best(view), view.spans, 0)
        return steps.image_sizes(chosen)

    def best(self, view: HiddenView) -> Tensor:
        """Which tokens stay, (B, N) bool."""
        stays = torch.zeros_like(view.spans, dtype=torch.bool)
        for rows, columns in images(view.spans):
            for row, own in zip(rows[:, 0], columns, strict=True):
                frames = own * 0 if view.frames is None else view.frames[row, own]
                stays[row, own] = self.of_video(view.hidden[row, own].float(), frames)
        return stays

    def of_video(self, tokens: Tensor, frames: Tensor) -> Tensor:
        """Which tokens of one video stay, (M,) bool. tokens (M, E) float32, frames (M,) int64."""
        even = tokens.var(0, unbiased=False).argsort(stable=True)[: max(tokens.shape[1] // 2, 1)]
        tokens = unit(tokens[:, even])
        sizes = torch.bincount(frames)
        frames = (sizes > 0).cumsum(0)[frames] - 1  # numbers without gaps
        sizes, count = sizes[sizes > 0], int((sizes > 0).sum())
        total = tokens.new_zeros(count, tokens.shape[1]).index_add_(0, frames, tokens)
        of_video = likeness(tokens, tokens.mean(0))
        likes = of_video + likeness(tokens, (total / sizes[:, None])[frames])
        mean = of_video.new_zeros(count).index_add_(0, frames, of_video) / sizes
        unusual = torch.softmax((-mean + mean.min()) / TEMPERATURE, 0)
        rates = (self.budget * (1 + unusual - unusual.mean())).clamp(max=1.0)
        wanted = torch.maximum((rates * sizes).round().long(), sizes.clamp(max=self.min_tokens))
        ranks = steps.ranks(-likes[None, None], frames[None])[0, 0]
        return ranks < wanted[frames]


def likeness(tokens: Tensor, centre: Tensor) -> Tensor:
    """g of the module's docstring, (M,) float32, of tokens (M, E) and centres (E,) or (M, E)."""
    far = (tokens - centre).square().sum(-1)
    return torch.stack([torch.exp(-far / (2 * width)) for width in WIDTHS]).sum(0)
