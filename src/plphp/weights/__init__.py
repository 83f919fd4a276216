"""Weights of a model: complete as its files, or rounded to 8 or 4 bits to save memory."""

from plphp.weights.complete import Tell, check_complete, warn
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
    "Tell",
    "check_complete",
    "decoder_modules",
    "round_weights",
    "rounded",
    "step_bytes",
    "warn",
    "weight_bytes",
]
