"""Where the images of a prompt are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from plphp.policy import KeepPlan
from plphp.policy.view import PADDING


@dataclass(frozen=True)
class Located:
    """Where the images of a prompt are, for the rows that the model sees.

    spans: (B, N) int64 of the prompt's columns; of all columns of the conversation with recall
    end: the column after the prompt's last one
    tokens_before: (B,) int64, tokens before the columns of `spans`, padding not counted
    images: the largest number of images in a row
    prunes: whether a layer may have to drop something: vision tokens or padding
    notes: remarks for the report, such as on images that could not be told apart
    places: (B, N) int64 row-logical position of each column, where some columns of the prompt are
        missing; None where all are there
    """

    spans: Tensor
    end: int
    tokens_before: Tensor
    images: int
    prunes: bool
    notes: tuple[str, ...] = ()
    places: Tensor | None = None

    @property
    def last_image(self) -> int:
        """The column after the last vision token of the conversation, 0 without vision tokens."""
        columns = (self.spans > 0).any(0).nonzero()
        first = self.end - self.spans.shape[1]
        return first + int(columns[-1]) + 1 if len(columns) else 0

    def positions(self) -> Tensor:
        """(B, N) int64 row-logical position of each column of `spans`: padding is not counted."""
        if self.places is not None:
            return self.places
        return (self.spans >= 0).cumsum(-1) - 1 + self.tokens_before[:, None]

    def only(self, plan: KeepPlan) -> Located:
        """The columns of a plan for a single KV head; its fillers count as padding."""
        columns = plan.columns[:, 0].to(self.spans.device)
        gone = ~plan.valid.to(self.spans.device)
        spans = self.spans.gather(1, columns).masked_fill(gone, PADDING)
        places = self.positions().gather(1, columns).masked_fill(gone, 0)
        return replace(self, spans=spans, places=places)


def spans_until(spans: Tensor, columns: int) -> Tensor:
    """Spans (B, columns) of a conversation. Columns after its last prompt are answer, so text."""
    spans = spans[:, :columns]
    return F.pad(spans, (0, columns - spans.shape[1]))
