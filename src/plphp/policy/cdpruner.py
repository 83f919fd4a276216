"""CDPruner (Zhang et al. 2025, arXiv 2506.10967): diverse tokens that are relevant to the prompt.

    c[i]    = - mean over text tokens t of cos(x_i, t)
    r[i]    = (c[i] - min c + 1e-6) / (max c - min c)                 relevance, of one image
    L[i, j] = r[i] cos(x_i, x_j) r[j]                                 kernel of a DPP
    next    = argmax_i  det(L of the chosen and i), greedily, until ceil(budget |V_i| - 1e-6)
    keep    = all text and the chosen tokens, in every layer

x are the embeddings of an image's tokens as they enter layer 0. The authors' program for LLaVA
takes the relevance from the two encoders of CLIP, with the sign above. The text encoder of CLIP is
no part of a model in transformers. As in OpenVINO GenAI, the embeddings of the language model are
used in its place: those of the text after the last image, or of all text where none follows.
Whether the sign fits these embeddings was not measured. The kernel takes 4 M^2 bytes for an image
of M tokens, and the greedy loop O(C^2 M) operations for C chosen ones. Every determinant of more
tokens than x has numbers, E, is 0, so that the rule decides about the first E tokens at most; the
loop ends there, and the others follow by what is left of their diagonal, which is rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.policy.hidden import (
    HiddenPolicy,
    HiddenView,
    most_wanted,
    scatter_order,
    stacked,
    together,
    unit,
)

LEAST = 1e-10  # the determinant of a token that adds nothing to the chosen ones
NOWHERE = -1e30  # that of a place that no token has: below every token's, above that of chosen ones


@dataclass(frozen=True)
class CDPruner(HiddenPolicy):
    """A share of each image, diverse and relevant, enters the language model (2506.10967).

    budget: the share of each image's tokens that stays, 0 to 1
    min_tokens: the number of tokens that stay of each image at least
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.5
    min_tokens: int = 1

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        asked = instruction(view.hidden, view.spans)
        scores = torch.zeros(view.spans.shape, device=view.spans.device)
        for group in together(view.spans):
            kernels = [
                kernel_of(unit(view.hidden[rows, columns]), asked[rows[:, 0]])
                for rows, columns in group
            ]
            count = most_wanted(group, view.spans, quota)
            scatter_order(scores, group, most_likely(kernels, count, view.hidden.shape[-1]))
        return scores


def kernel_of(tokens: Tensor, asked: Tensor) -> Tensor:
    """The kernel L, (I, M, M) float32, of the unit vectors (I, M, E) of images.

    asked: (I, E), what the tokens are relevant to
    """
    relevance = -(tokens @ asked[..., None])[..., 0]
    low, high = relevance.aminmax(dim=-1, keepdim=True)
    relevance = (relevance - low + 1e-6) / (high - low).clamp(min=1e-6)
    return relevance[..., None] * (tokens @ tokens.transpose(1, 2)) * relevance[:, None]


def instruction(hidden: Tensor, spans: Tensor) -> Tensor:
    """The mean (B, E) float32 of the unit embeddings of the text after the last image of each row.

    hidden (B, N, E), spans (B, N) int64. Of all text where no text follows an image.
    """
    columns = torch.arange(spans.shape[1], device=spans.device)
    last = torch.where(spans > 0, columns, -1).amax(-1, keepdim=True)
    text = spans == 0
    after = text & (columns > last)
    used = torch.where(after.any(-1, keepdim=True), after, text)[..., None]
    return (unit(hidden) * used).sum(1) / used.sum(1).clamp(min=1)


def most_likely(kernels: list[Tensor], count: int, rank: int) -> Tensor:
    """Tokens in the order in which the greedy maximum of a DPP chooses them, (I, count) int64.

    kernels: (I_k, M_k, M_k) float32 of the images of each size; rank: an upper bound of their rank.
    The choice goes on with places that no token has where an image has fewer than `count`. Chen et
    al. 2018 (arXiv 1709.05135), algorithm 1: rows of a Cholesky factor are added one by one.
    """
    gain = stacked([one.diagonal(dim1=1, dim2=2) for one in kernels], NOWHERE).clone()
    kernel = stacked(kernels, 0.0)
    every = torch.arange(len(kernel), device=kernel.device)
    loops = min(count, rank)
    factor = kernel.new_empty(len(kernel), loops, kernel.shape[-1])
    chosen = torch.empty(loops, len(kernel), dtype=torch.int64, device=kernel.device)
    for step in range(loops):
        best = torch.argmax(gain, -1, out=chosen[step])
        before = factor[:, :step]
        shared = (before[every, :, best][:, None] @ before)[:, 0]
        root = gain[every, best].clamp(min=LEAST).sqrt()
        factor[:, step] = row = (kernel[every, best] - shared) / root[:, None]
        gain.addcmul_(row, row, value=-1)
        gain[every, best] = -torch.inf  # chosen tokens are not chosen again
    if loops == count:
        return chosen.T
    return torch.cat([chosen.T, gain.topk(count - loops, dim=-1).indices], -1)
