"""The two towers of Qwen2-VL for training: the arithmetic of transformers, without its bookkeeping.

On two cores the bookkeeping (ragged picture sizes, caches, mask building) costs as much as the
matrix products of a model this small. Here pictures have one size per batch, and masks and
positions come ready from ``packing``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

EARLY_LAYERS = (
    2  # after so many text layers ``run_text`` hands out its hidden states to the position probe
)


def encode_pictures(visual: Any, patches: Tensor, side: int) -> Tensor:
    """[N, 4 side^2, 588] -> [N, side^2, d]; the two frames are alike, so weights are summed."""
    count, length, _ = patches.shape
    x = functional.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    cos, sin = _vision_rotation(visual, side)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(count, length, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query = _rotate(query, cos, sin).to(value.dtype).transpose(1, 2)
        key = _rotate(key, cos, sin).to(value.dtype).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(query, key, value.transpose(1, 2))
        x = x + attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
        x = x + block.mlp(block.norm2(x))
    features: Tensor = visual.merger(x)
    return features.view(count, side * side, -1)


def run_text(text: Any, x: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Final and early hidden states; x [B, L, d], positions [3, B, L], mask [B, 1, L, L]."""
    cos, sin = (angle.to(x.dtype) for angle in _text_rotation(text, positions))
    early = x
    for i, layer in enumerate(text.layers):
        if i == EARLY_LAYERS:
            early = x
        x = x + _attend(text.config, layer, x, cos, sin, mask)
        hidden = _rms(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        x = x + mlp.down_proj(functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
    return _rms(x, text.norm.weight), early


def _attend(config: Any, layer: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    projected = functional.linear(
        _rms(x, layer.input_layernorm.weight),
        torch.cat([projection.weight for projection in projections]),
        torch.cat([projection.bias for projection in projections]),
    )
    widths = [heads * size, kv_heads * size, kv_heads * size]
    query, key, value = (
        part.view(*x.shape[:2], -1, size).transpose(1, 2) for part in projected.split(widths, -1)
    )
    query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
    group = heads // kv_heads
    mixed = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), attn_mask=mask
    )
    out: Tensor = attention.o_proj(mixed.transpose(1, 2).reshape(*x.shape[:2], -1))
    return out


def _vision_rotation(visual: Any, side: int) -> tuple[Tensor, Tensor]:
    """cos, sin [4 side^2, 1, head size] of the patches, cell by cell as the merger wants them."""
    row = torch.arange(2 * side)[:, None].expand(2 * side, 2 * side)
    by_cell = [axis.reshape(side, 2, side, 2).transpose(1, 2).flatten() for axis in (row, row.T)]
    angles = (torch.stack(by_cell, -1)[..., None] * visual.rotary_pos_emb.inv_freq).flatten(1)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def _text_rotation(text: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, L, head size]: M-RoPE, whose sections take turns at time, row and column."""
    angles = positions[..., None].float() * text.rotary_emb.inv_freq
    sections = angles.split(text.config.rope_parameters["mrope_section"], -1)
    mixed = torch.cat([section[axis] for axis, section in enumerate(sections)], -1)
    mixed = torch.cat([mixed, mixed], -1)[:, None]
    return mixed.cos(), mixed.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat((-right, left), -1) * sin


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), 1e-6)
