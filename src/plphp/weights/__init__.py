"""Weights of a model rounded to 8 or 4 bits, for machines with little memory."""

from plphp.weights.linear import HAS_BFLOAT16, Int4Linear, Int8Embedding, Int8Linear
from plphp.weights.rounding import (
    BITS,
    decoder_modules,
    round_weights,
    rounded,
    step_bytes,
    weight_bytes,
)

__all__ = [
    "BITS",
    "HAS_BFLOAT16",
    "Int4Linear",
    "Int8Embedding",
    "Int8Linear",
    "decoder_modules",
    "round_weights",
    "rounded",
    "step_bytes",
    "weight_bytes",
]
