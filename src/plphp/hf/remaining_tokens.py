"""The tokens that stay in the hidden states under a sequence method, and masks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedModeError
from plphp.policy import KeepPlan


@dataclass
class RemainingTokens:
    """The tokens of a prompt that stay. One layer plans them, and all layers after it use them.

    plan: the columns that stay, a plan for a single KV head
    prompt: N, number of columns of the prompt
    flash: whether the attention function accepts only a mask (B, K), as FlashAttention does
    """

    plan: KeepPlan
    prompt: int
    flash: bool
    _masks: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def columns(self) -> Tensor:
        """(B, K) int64, the columns that stay; row b uses the last `plan.lengths[b]` entries."""
        return self.plan.columns[:, 0]

    def mask(self, mask: Any, columns: Tensor) -> Tensor | None:
        """A layer's attention mask for the columns that stay.

        It is computed once for all layers that share a mask.

        mask: the model's, (B, N) or (B or 1, heads, N, N), bool or additive; None for causal
            attention without padding
        columns: (B, K) int64, on the device of the mask
        Returns a mask (B, K) or (B, heads, K, K), or None for causal attention.
        Raises UnsupportedModeError for a mask that is no tensor, such as flex attention's.
        """
        if mask is None and not self.plan.ragged:
            return None
        if id(mask) not in self._masks:
            # The mask is kept too: while it exists, no other object has the same id.
            self._masks[id(mask)] = (mask, self._reduced(mask, columns))
        return self._masks[id(mask)][1]

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
            return select_columns(mask, -1, columns) * valid
        else:
            mask = mask.expand(len(columns), *mask.shape[1:])
            rows = columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, rows)
            across = columns[:, None, None].expand(-1, *mask.shape[1:3], -1)
            mask = mask.gather(3, across)
        # A filler attends to itself, so that no row of the softmax is empty.
        hidden = ~valid[:, None, None] & (slots != slots[:, None])
        reduced: Tensor = mask
        if reduced.dtype == torch.bool:
            return reduced & ~hidden
        return reduced.masked_fill(hidden, torch.finfo(reduced.dtype).min)


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
