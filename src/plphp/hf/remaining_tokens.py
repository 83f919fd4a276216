"""The tokens that stay in the hidden states under a sequence method, and masks for them.

`RemainingTokens` are those of a whole prompt. `Part` are those of one forward, which brings the
whole prompt, a chunk of it, or the prompt and the tokens that assisted decoding guessed after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plphp.errors import UnsupportedModeError
from plphp.hf.located import Located
from plphp.policy import KeepPlan
from plphp.policy.view import keep_in_every_head


@dataclass
class RemainingTokens:
    """The tokens of a prompt that stay. They are planned before one layer, and all later ones use
    them.

    plan: the columns that stay, a plan for a single KV head, counted from the prompt's first
    where: the spans and positions of these columns
    prompt: N, number of columns of the prompt
    flash: whether the attention function accepts only a mask (B, S), as FlashAttention does
    """

    plan: KeepPlan
    where: Located
    prompt: int
    flash: bool
    _parts: dict[tuple[int, int], Part] = field(default_factory=dict)

    @property
    def columns(self) -> Tensor:
        """(B, K) int64, the columns that stay; row b uses the last `plan.lengths[b]` entries."""
        return self.plan.columns[:, 0]

    def part(self, first: int, count: int) -> Part:
        """What stays of the columns [first, first + count), counted from the prompt's first one.

        Columns after the prompt are guessed tokens, which all stay.
        """
        if (first, count) not in self._parts:
            plan = self.plan if (first, count) == (0, self.prompt) else self._only(first, count)
            self._parts = {(first, count): Part(plan, count, self.flash)}
        return self._parts[first, count]

    def _only(self, first: int, count: int) -> KeepPlan:
        """The plan of `part`. A layer needs an input, so a part without tokens has a filler."""
        columns, valid = self.columns, self.plan.valid.to(self.columns.device)
        keep = valid.new_zeros(len(columns), self.prompt).scatter_(1, columns, valid)
        guessed = max(first + count - self.prompt, 0)
        keep = F.pad(keep, (0, guessed), value=True)[:, first : first + count]
        return keep_in_every_head(keep, 1, least=1)


@dataclass
class Part:
    """The tokens of one forward that stay.

    plan: the columns that stay, a plan for a single KV head, counted from the forward's first
    count: T, number of columns of the forward
    flash: as in `RemainingTokens`
    """

    plan: KeepPlan
    count: int
    flash: bool
    _masks: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def columns(self) -> Tensor:
        """(B, K) int64, the columns that stay; row b uses the last `plan.lengths[b]` entries."""
        return self.plan.columns[:, 0]

    def mask(self, mask: Any, columns: Tensor) -> Tensor | None:
        """A layer's attention mask for the columns that stay.

        It is computed once for all layers that share a mask.

        mask: the model's, (B, S) or (B or 1, heads, T, S), bool or additive; None for causal
            attention without padding. S is T and the columns before them
        columns: (B, K) int64, on the device of the mask
        Returns a mask (B, S') or (B, heads, K, S'), or None for causal attention; S' is K and the
        columns before the forward's.
        Raises UnsupportedModeError for a mask that is no tensor, such as flex attention's.
        """
        if mask is None and not self.plan.ragged:
            return None
        if id(mask) not in self._masks:
            # The mask is kept too: while it exists, no other object has the same id.
            self._masks[id(mask)] = (mask, self._reduced(mask, columns))
        return self._masks[id(mask)][1]

    def flags(self, mask: Any, columns: Tensor) -> Tensor:
        """A mask (B, K) of a layer without attention: which columns are tokens.

        mask: the model's (B, T), or (B, S) with the columns before them; None without padding
        """
        valid = self.plan.valid.to(columns.device)
        if mask is None:
            return valid
        return select_columns(mask[:, -self.count :], -1, columns) * valid

    def added(self, mask: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """The features that a model adds to the hidden states of vision tokens, of those that stay.

        mask: (B, T) bool, the vision tokens; features: (V, E), one for each True, row by row
        Returns such a mask (B, K), and the features of its tokens.
        """
        columns = self.columns.to(mask.device)
        number = (mask.flatten().cumsum(0) - 1).view_as(mask)
        stays = mask.gather(1, columns) & self.plan.valid.to(mask.device)
        return stays, features[number.gather(1, columns)[stays].to(features.device)]

    def _reduced(self, mask: Any, columns: Tensor) -> Tensor:
        """The mask of `mask`, where it is not None or rows differ in length."""
        slots = torch.arange(columns.shape[1], device=columns.device)
        valid = self.plan.valid.to(columns.device)
        if mask is None and self.flash:
            return valid
        if mask is None:
            mask = (slots <= slots[:, None])[None, None]
        elif not isinstance(mask, Tensor):
            raise UnsupportedModeError(
                f"a {type(mask).__name__} cannot be reduced to the tokens that stay: use sdpa, "
                "eager or FlashAttention"
            )
        elif mask.dim() == 2:
            earlier = mask[:, : -self.count]
            new = select_columns(mask[:, -self.count :], -1, columns) * valid
            return torch.cat([earlier.expand(len(new), -1), new], -1)
        else:
            mask = self._gathered(mask, columns)
        # A filler attends to itself, so that no row of the softmax is empty.
        hidden = ~valid[:, None, None] & (slots != slots[:, None])
        hidden = F.pad(hidden, (mask.shape[-1] - len(slots), 0))
        reduced: Tensor = mask
        if reduced.dtype == torch.bool:
            return reduced & ~hidden
        return reduced.masked_fill(hidden, torch.finfo(reduced.dtype).min)

    def _gathered(self, mask: Tensor, columns: Tensor) -> Tensor:
        """(B, heads, K, S') of a mask (B or 1, heads, T, S) whose last T keys are the forward's."""
        mask = mask.expand(len(columns), *mask.shape[1:])
        rows = columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.gather(2, rows)
        across = columns[:, None, None].expand(-1, *mask.shape[1:3], -1)
        new = mask[..., -self.count :].gather(3, across)
        return torch.cat([mask[..., : -self.count], new], -1)


def select_columns(tensor: Tensor, dim: int, columns: Tensor) -> Tensor:
    """Select columns of a tensor, other ones in each row.

    dim: negative index of the dimension that counts columns; the dimension before it is the batch,
        of size B or 1, or missing
    columns: (B, K) int64
    Returns the tensor with a batch of B and K columns.
    """
    if tensor.dim() == -dim:
        tensor = tensor[None]
    at = tensor.dim() + dim
    shape, index = list(tensor.shape), [1] * tensor.dim()
    shape[at - 1] = len(columns)
    index[at - 1], index[at] = columns.shape
    tensor = tensor.expand(shape)
    shape[at] = columns.shape[1]
    return tensor.gather(at, columns.view(index).expand(shape))
