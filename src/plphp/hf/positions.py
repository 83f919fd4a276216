"""Position ids of the later turns of a conversation.

In M-RoPE models (Qwen-VL, GLM-V) positions and columns differ. transformers stores the difference
(`rope_deltas`) on the model object, where the next conversation overwrites it. So a `PrunedCache`
stores the difference of its own conversation, called shift, and later turns are given explicit
position ids that are computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plphp.hf.located import Located
from plphp.models import processor_inputs


def mrope_module(model: Any) -> Any:
    """The module of a model that computes M-RoPE positions, None if the model has none."""
    for module in (model, getattr(model, "model", None)):
        if hasattr(module, "rope_deltas") and hasattr(module, "get_rope_index"):
            return module
    return None


def position_shift(model: Any, position_ids: Tensor | None, drafts: int, where: Located) -> Tensor:
    """(B,) int64, position id minus column, for the text that follows a prompt.

    position_ids: (B, T) or (axes, B, T) of the forward that brought the prompt's last column. None
        if the model computed them; then its `rope_deltas` are those of this prompt
    drafts: how many columns of that forward come after the prompt
    where: the images of the prompt
    """
    spans, column = where.spans, where.end - 1
    if position_ids is not None:
        last = position_ids.reshape(-1, *position_ids.shape[-2:])[-1, :, -1 - drafts]
        return (last - column).expand(len(spans)).to(spans.device)
    padding = (spans < 0).sum(-1)
    module = mrope_module(model)
    deltas: Tensor | None = None if module is None else module.rope_deltas
    if deltas is None:
        return -padding
    deltas = deltas.reshape(-1).to(spans.device)
    return deltas.repeat_interleave(len(spans) // len(deltas)) - padding


def later_positions(
    model: Any, shift: Tensor | None, past: int | Tensor, length: int, source: Mapping[str, Any]
) -> Tensor | None:
    """(3, B, length) int64 M-RoPE positions of the columns that a later turn adds.

    shift: (B,) as `position_shift` returns it, None before the first prompt
    past: columns that the cache has seen, in a compiled step a 0-dim int64 tensor
    length: columns that the turn adds
    source: inputs of the turn. Its grids describe only the images that it adds

    Returns None if the model computes the right positions: in a first turn, with ordinary RoPE, or
    if the caller gives position_ids.
    """
    module = mrope_module(model)
    first = not isinstance(past, Tensor) and not past
    if module is None or first or shift is None or source.get("position_ids") is not None:
        return None
    start = (past + shift)[None, :, None]
    ids, kinds = source.get("input_ids"), source.get("mm_token_type_ids")
    grids = processor_inputs(source)
    mask = source.get("attention_mask")
    new = None if mask is None or mask.dim() != 2 else mask[:, -length:].to(shift.device)
    if ids is None or kinds is None or not grids or not bool(kinds[:, -length:].any()):
        count = torch.arange(length, device=shift.device)
        if new is not None:  # padding between turns has no positions
            count = new.long().cumsum(-1).sub(1).clamp(min=0)
        return (start + count).expand(3, -1, -1)
    timing = {name: source[name] for name in ("second_per_grid_ts",) if name in source}
    positions: Tensor = module.get_rope_index(
        ids[:, -length:],
        mm_token_type_ids=kinds[:, -length:],
        attention_mask=None if new is None else new.to(ids.device),
        **grids,
        **timing,
    )[0]
    return positions + start.to(positions.device)
