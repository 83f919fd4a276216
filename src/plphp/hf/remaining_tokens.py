"""The tokens that a sequence method leaves in the hidden states, and the masks for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from plphp.errors import UnsupportedModeError
from plphp.policy import KeepPlan


@dataclass
class RemainingTokens:
    """Planned by one layer of a prompt, and used by all layers after it.

    plan: the columns that stay, as for one KV head, right-aligned as in any plan
    prompt: N, columns of the prompt
    flash: whether the attention function takes a mask (B, K) only, as FlashAttention's does
    """

    plan: KeepPlan
    prompt: int
    flash: bool
    _masks: dict[int, tuple[Any, Tensor]] = field(default_factory=dict)

    @property
    def columns(self) -> Tensor:
        """(B, K) int64."""
        return self.plan.columns[:, 0]

    def mask(self, mask: Any, columns: Tensor) -> Tensor | None:
        """A layer's mask for the columns (B, K) that stay, made once for all layers that share it.

        mask: (B, N), (B or 1, heads, N, N) bool or additive, or None for plain causal attention
        Raises UnsupportedModeError for a mask that is no tensor, such as flex attention's.
        """
        if mask is None and not self.plan.ragged:
            return None
        if id(mask) not in self._masks:
            # The mask itself is kept too, so that no other can get its id.
            self._masks[id(mask)] = (mask, self._made(mask, columns))
        return self._masks[id(mask)][1]

    def _made(self, mask: Any, columns: Tensor) -> Tensor:
        last = columns.shape[1]
        slots = torch.arange(last, device=columns.device)
        valid = self.plan.valid.to(columns.device)
        if mask is None and self.flash:
            return valid
        if mask is None:
            mask = (slots <= slots[:, None])[None, None]
        elif not isinstance(mask, Tensor):
            raise UnsupportedModeError(
                f"a {type(mask).__name__} cannot be cut to the tokens that stay: use sdpa, eager "
                "or FlashAttention"
            )
        elif mask.dim() == 2:
            return take(mask, -1, columns) * valid
        else:
            mask = mask.expand(len(columns), *mask.shape[1:])
            rows = columns[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, rows)
            across = columns[:, None, None].expand(-1, *mask.shape[1:3], -1)
            mask = mask.gather(3, across)
        # A filler sees itself, so that no row of the softmax is empty.
        hidden = ~valid[:, None, None] & (slots != slots[:, None])
        made: Tensor = mask
        if made.dtype == torch.bool:
            return made & ~hidden
        return made.masked_fill(hidden, torch.finfo(made.dtype).min)


def take(tensor: Tensor, dim: int, columns: Tensor) -> Tensor:
    """Columns (B, K) of a tensor whose negative dimension `dim` counts columns.

    The dimension before it is the batch: B, or 1, or missing.
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
