"""With recall and two stages: which columns of the conversation entered a layer at all.

A later turn reads all tokens again. Those that a sequence method dropped never had keys in the
layers after it, so that each layer remembers its own columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plphp.hf.layer import PrunedLayer
from plphp.hf.located import Located
from plphp.hf.prompt import Prefill
from plphp.policy.view import keep_in_every_head


def columns_entered(layer: PrunedLayer, prefill: Prefill) -> Tensor | None:
    """(B, end) bool, the columns up to the prompt's end that entered a layer; None for all."""
    prompt, remaining = prefill.prompt, prefill.remaining
    if layer.entered is None and remaining is None:
        return None
    spans = prefill.where.spans
    entered = torch.ones(len(spans), prompt.end, dtype=torch.bool, device=spans.device)
    if layer.entered is not None:
        before = layer.entered[:, : prompt.begin]
        entered[:, : before.shape[1]] = before
    if remaining is not None:
        columns, valid = (x.to(spans.device) for x in (remaining.columns, remaining.plan.valid))
        new = torch.zeros_like(entered[:, prompt.begin :])
        entered[:, prompt.begin :] = new.scatter_(1, columns, valid)
    return entered


def located_here(layer: PrunedLayer, prefill: Prefill) -> Located | None:
    """Where the images are in the slots of a layer in a later turn; None where all columns are."""
    entered, where = columns_entered(layer, prefill), prefill.where
    if entered is None:
        return None
    keep, begin = entered.clone(), prefill.prompt.begin
    if layer.entered is not None:  # the padding of earlier turns was not restored
        keep[:, :begin] &= where.spans[:, :begin] >= 0
    return where.only(keep_in_every_head(keep, 1))
