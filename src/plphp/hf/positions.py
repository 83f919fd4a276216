"""Positions of a conversation's later turns, from its cache and not from the model object.

M-RoPE models (Qwen-VL, GLM-V) keep on the model by how much positions run ahead of or behind the
columns, so that the next conversation overwrites it. A `PrunedCache` keeps that shift itself, and
later turns are given explicit positions computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plphp.hf.prompt import Located
from plphp.models import processor_inputs


def mrope_module(model: Any) -> Any:
    """The part of a model that computes multimodal positions, or None."""
    for module in (model, getattr(model, "model", None)):
        if hasattr(module, "rope_deltas") and hasattr(module, "get_rope_index"):
            return module
    return None


def position_shift(model: Any, position_ids: Tensor | None, drafts: int, where: Located) -> Tensor:
    """(B,) position minus column of the text that follows a prompt.

    position_ids (B, T) or (axes, B, T) of the forward that brought the prompt's last column, and
    `drafts` more after it; None where the model computed them and left its deltas behind.
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
    model: Any, shift: Tensor | None, past: int, length: int, source: Mapping[str, Any]
) -> Tensor | None:
    """(3, B, length) M-RoPE positions of the columns that a later turn adds to `past` others.

    source: the turn's own inputs; its grids describe the images that it adds. None where the model
    finds the positions by itself: a first turn, ordinary RoPE, or positions given by the caller.
    """
    module = mrope_module(model)
    if module is None or not past or shift is None or source.get("position_ids") is not None:
        return None
    start = (past + shift)[None, :, None]
    ids, kinds = source.get("input_ids"), source.get("mm_token_type_ids")
    grids = processor_inputs(source)
    mask = source.get("attention_mask")
    new = None if mask is None or mask.dim() != 2 else mask[:, -length:].to(shift.device)
    if ids is None or kinds is None or not grids or not bool(kinds[:, -length:].any()):
        count = torch.arange(length, device=shift.device)
        if new is not None:  # padding between turns is not counted
            count = new.long().cumsum(-1).sub(1).clamp(min=0)
        return (start + count).expand(3, -1, -1)
    more = {name: source[name] for name in ("second_per_grid_ts",) if name in source}
    positions: Tensor = module.get_rope_index(
        ids[:, -length:],
        mm_token_type_ids=kinds[:, -length:],
        attention_mask=None if new is None else new.to(ids.device),
        **grids,
        **more,
    )[0]
    return positions + start.to(positions.device)
