"""Initialises a larger model with the weights of an older one, so that it gives the same answers.

The larger model has more layers and other words. An added layer is a copy of the layer before it
with output projections of zero, so that at first it adds nothing to the hidden states.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration


def grow(model: Any, tokenizer: Any, folder: Path) -> None:
    """Give ``model`` the weights of the model in ``folder``, which must not be deeper or wider."""
    old = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text, old_text = model.model.language_model, old.model.language_model
    visual, old_visual = model.model.visual, old.model.visual
    with torch.no_grad():
        words = _words(
            old_text.embed_tokens.weight, AutoTokenizer.from_pretrained(folder), tokenizer
        )
        text.embed_tokens.weight.copy_(words)
        _copy_stack(text.layers, old_text.layers, ("self_attn.o_proj", "mlp.down_proj"))
        _copy_stack(visual.blocks, old_visual.blocks, ("attn.proj", "mlp.fc2"))
    text.norm.load_state_dict(old_text.norm.state_dict())
    visual.patch_embed.load_state_dict(old_visual.patch_embed.state_dict())
    visual.merger.load_state_dict(old_visual.merger.state_dict())


def sources(depth: int, old_depth: int) -> list[tuple[int, bool]]:
    """For every new layer the index of the old layer that it copies, and whether it is added.

    The added layers are in the upper half, because the lower layers only collect positions.
    """
    added = depth - old_depth
    behind = [old_depth - 1 - (i * old_depth) // (2 * max(added, 1)) for i in range(added)]
    out = []
    for i in range(old_depth):
        out.append((i, False))
        out += [(i, True)] * behind.count(i)
    return out


def _copy_stack(layers: Any, old_layers: Any, outputs: tuple[str, ...]) -> None:
    for layer, (source, added) in zip(layers, sources(len(layers), len(old_layers)), strict=True):
        layer.load_state_dict(old_layers[source].state_dict())
        for name in outputs if added else ():
            for parameter in layer.get_submodule(name).parameters():
                parameter.zero_()


def _words(old: Tensor, old_tokenizer: Any, tokenizer: Any) -> Tensor:
    """The embedding of every token: for a new token, the mean of the old tokens that spell it."""
    known = old_tokenizer.get_vocab()
    rows = []
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        ids = [known[token]] if token in known else _spelled(old_tokenizer, tokenizer, token)
        rows.append(old[ids].mean(0))
    return torch.stack(rows)


def _spelled(old_tokenizer: Any, tokenizer: Any, token: str) -> list[int]:
    text = tokenizer.convert_tokens_to_string([token])
    ids: list[int] = old_tokenizer.encode(text, add_special_tokens=False)
    return ids
