"""Language models of real sizes with random weights, to measure time and memory.

A shape is the decoder of a vision-language model. The vision tower is left out, because its work
does not depend on the cache; a `vision_mask` says which columns are vision tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from plphp.errors import InputError
from plphp.hf import compat
from plphp.policy.checks import meant_name


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder.

    config: the class of its config, None for a loaded model
    head: size of a head; None for hidden / heads
    weights: weights that a decoding step reads; None to compute them from the sizes
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
        """Number of weights that a decoding step reads: all except the input embeddings."""
        if self.weights is not None:
            return self.weights
        wide = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = self.hidden * (wide + 3 * self.intermediate)
        return self.layers * layer + self.hidden * self.vocabulary

    def kv_bytes(self, tokens: float, size: int) -> int:
        """Bytes of the keys and values of this many tokens. size: bytes of one number."""
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
    """A shape by its name. Raises InputError for an unknown one.

    layers: how many of its layers to use, None for all
    """
    if name not in SHAPES:
        known = f"{meant_name(name, SHAPES)}; known are {', '.join(SHAPES)}"
        raise InputError(f"--shape: unknown shape {name!r}{known}")
    shape = SHAPES[name]
    if layers is None:
        return shape
    if not 1 <= layers <= shape.layers:
        raise InputError(f"--layers: {name} has 1 to {shape.layers}, not {layers}")
    return replace(shape, layers=layers)


def shape_of_model(name: str, model: Any) -> Shape:
    """The shape of a loaded model's decoder.

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
    """A transformers decoder of this shape, on the device and in evaluation mode."""
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
    """Bytes that a run allocates, approximately: the weights, a full cache and a copy of it."""
    table = shape.vocabulary * shape.hidden
    return size * (shape.parameters + table) + 2 * shape.kv_bytes(batch * context, size)
