"""The vision tower and the language model of Qwen2-VL for training, with less overhead.

The results are those of transformers. For so small a model on two cores, transformers' handling of
picture sizes, caches and masks takes as long as the matrix products. Here all pictures of one size
are encoded together, and ``packing`` makes the masks and positions. The prefix with the pictures
attends causally to itself, without a mask. In the last layer only its keys and values are computed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.attention import attend

EARLY_LAYERS = (
    2  # after so many text layers ``run_text`` hands out its hidden states to the position probe
)


def encode_pictures(visual: Any, patches: Tensor, high: int, wide: int) -> Tensor:
    """The features [N, high wide, d] of pictures with patches [N, 4 high wide, 588].

    Both frames of a patch are equal, so that the weights of the two are summed.
    """
    count, length, _ = patches.shape
    x = functional.linear(patches, visual.patch_embed.proj.weight.sum(2).flatten(1))
    cos, sin = _vision_rotation(visual, high, wide)
    for block in visual.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(x)).view(count, length, 3, attention.num_heads, -1)
        query, key, value = qkv.unbind(2)
        query = _rotate(query, cos, sin).to(value.dtype).transpose(1, 2)
        key = _rotate(key, cos, sin).to(value.dtype).transpose(1, 2)
        mixed = attend(query, key, value.transpose(1, 2))
        x = x + attention.proj(mixed.transpose(1, 2).reshape(count, length, -1))
        x = x + block.mlp(block.norm2(x))
    features: Tensor = visual.merger(x)
    return features.view(count, high * wide, -1)


def run_text(
    text: Any, x: Tensor, positions: Tensor, mask: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """The final hidden states of the tokens after the prefix, and early states of all tokens.

    x [B, L, d], positions [3, B, L], mask [B, 1, L - prefix, L] of the tokens after the prefix.
    """
    cos, sin = (angle.to(x.dtype) for angle in _text_rotation(text, positions))
    early, last = x, len(text.layers) - 1
    for i, layer in enumerate(text.layers):
        if i == EARLY_LAYERS:
            early = x
        mixed = _attend(text.config, layer, x, cos, sin, mask, prefix, ends=i == last)
        x = (x[:, prefix:] if i == last else x) + mixed
        hidden = _rms(x, layer.post_attention_layernorm.weight)
        mlp = layer.mlp
        x = x + mlp.down_proj(functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
    return _rms(x, text.norm.weight), early


def _attend(
    config: Any,
    layer: Any,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    prefix: int,
    ends: bool,
) -> Tensor:
    """The attention output of all tokens, or only after the prefix in the last layer (``ends``)."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    attention = layer.self_attn
    normed = _rms(x, layer.input_layernorm.weight)
    asks = normed[:, prefix:] if ends else normed
    query, key, value = (
        projection(source).view(*source.shape[:2], -1, size).transpose(1, 2)
        for projection, source in (
            (attention.q_proj, asks),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    skipped = prefix if ends else 0
    query = _rotate(query, cos[:, :, skipped:], sin[:, :, skipped:])
    key = _rotate(key, cos, sin).repeat_interleave(heads // kv_heads, 1)
    value = value.repeat_interleave(heads // kv_heads, 1)
    behind = attend(query[:, :, prefix - skipped :], key, value, mask)
    parts = [behind]
    if not ends:
        seen = (part[:, :, :prefix] for part in (query, key, value))
        parts = [attend(*seen, causal=True), behind]
    mixed = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    out: Tensor = attention.o_proj(mixed)
    return out


def _vision_rotation(visual: Any, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """cos and sin [4 high wide, 1, head size] of the patches, in the merger's order: by cells."""
    row = torch.arange(2 * high)[:, None].expand(2 * high, 2 * wide)
    column = torch.arange(2 * wide).expand(2 * high, 2 * wide)
    by_cell = [axis.reshape(high, 2, wide, 2).transpose(1, 2).flatten() for axis in (row, column)]
    angles = (torch.stack(by_cell, -1)[..., None] * visual.rotary_pos_emb.inv_freq).flatten(1)
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def _text_rotation(text: Any, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B, 1, L, head size] of M-RoPE, with sections for time, row and column."""
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
