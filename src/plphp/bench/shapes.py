"""Language models of real sizes with random weights: for speed and memory, never for answers.

A shape is the decoder of a vision-language model. The vision tower is the same work for every cache
and is left out; vision tokens are marked by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from plphp.errors import InputError
from plphp.hf import compat


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    config: its class, None for a model that is loaded
    head, weights: its head size and what a step reads of it, where they do not follow
    """

    name: str
    config: Any
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    head: int | None = None
    weights: int | None = None

    @property
    def head_dim(self) -> int:
        return self.head or self.hidden // self.heads

    @property
    def parameters(self) -> int:
        """Weights that a decode step reads: all but the embedding table."""
        if self.weights is not None:
            return self.weights
        wide = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = self.hidden * (wide + 3 * self.intermediate)
        return self.layers * layer + self.hidden * self.vocabulary

    def kv_bytes(self, tokens: float, size: int) -> int:
        """Bytes of the keys and values of so many tokens. size: bytes of a number."""
        return int(2 * self.layers * self.kv_heads * self.head_dim * size * tokens)


_TABLE = (
    Shape("tiny", Qwen2Config, 6, 512, 8, 2, 1408, 8192),
    Shape("qwen2-vl-2b", Qwen2Config, 28, 1536, 12, 2, 8960, 151936),
    Shape("qwen2-vl-7b", Qwen2Config, 28, 3584, 28, 4, 18944, 152064),
    Shape("llava-onevision-7b", Qwen2Config, 28, 3584, 28, 4, 18944, 152000),
    Shape("llava-1.5-7b", LlamaConfig, 32, 4096, 32, 32, 11008, 32064),
    Shape("mantis-8b", LlamaConfig, 32, 4096, 32, 8, 14336, 128320),
    Shape("idefics2-8b", LlamaConfig, 32, 4096, 32, 8, 14336, 32003),
)
SHAPES: dict[str, Shape] = {shape.name: shape for shape in _TABLE}


def shape_of(name: str, layers: int | None) -> Shape:
    """A shape by name, cut to its first layers if asked. Raises InputError."""
    if name not in SHAPES:
        raise InputError(f"--shape: unknown shape {name!r}; known are {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if layers is None:
        return shape
    if not 1 <= layers <= shape.layers:
        raise InputError(f"--layers: {name} has 1 to {shape.layers}, not {layers}")
    return replace(shape, layers=layers)


def shape_of_model(name: str, model: Any) -> Shape:
    """The shape of the decoder inside a loaded model.

    Raises InputError for a decoder whose layers differ in size: one shape cannot describe it.
    """
    config = compat.text_config(model)
    sizes = ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    hidden, heads, kv_heads, inner = (compat.config_value(config, size) for size in sizes)
    if any(isinstance(value, list) for value in (hidden, heads, kv_heads, inner)):
        raise InputError(f"{name}: the sizes of its layers differ, which bench cannot describe")
    decoder = model.get_decoder()
    read = (
        sum(p.numel() for p in decoder.parameters()) - decoder.get_input_embeddings().weight.numel()
    )
    return Shape(
        name,
        None,
        config.num_hidden_layers,
        hidden,
        heads,
        kv_heads,
        inner,
        config.vocab_size,
        compat.head_dim(config),
        read + hidden * config.vocab_size,
    )


def build(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A transformers decoder of a shape, on a device, ready to generate."""
    config = shape.config(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1 << 20,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def needed_bytes(shape: Shape, context: int, batch: int, size: int) -> int:
    """What a run allocates, about: weights, one full cache and what is made of it."""
    table = shape.vocabulary * shape.hidden
    return size * (shape.parameters + table) + 2 * shape.kv_bytes(batch * context, size)
