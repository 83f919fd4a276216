"""The longest context and the largest batch that fit into memory, with and without pruning."""

from __future__ import annotations

from typing import Any

from plphp.bench.shapes import Shape
from plphp.cache import slack

WHOLE = 2  # layers that may hold the whole prompt at the same time during the prefill


def fits(
    shape: Shape,
    memory: int,
    rate: float,
    size: int,
    context: int,
    batch: int,
    weights: int | None = None,
) -> dict[str, Any]:
    """The context that fits for `batch` rows, and the rows that fit with `context` columns.

    memory: bytes, which hold the weights too
    rate: share of the prompt that is kept, averaged over the layers
    size: bytes of one number
    weights: bytes of all weights, None for as many as the shape has in full

    A pruned prompt takes the kept share of all layers with its slack and, during the prefill, up to
    two layers in full. Hidden states and logits are equal for both and are left out.
    """
    if weights is None:
        weights = size * (shape.parameters + shape.vocabulary * shape.hidden)
    left = memory - weights
    token = shape.kv_bytes(1, size)
    kept = rate + slack(10**6) / 10**6 * rate
    peak = token * min(1.0, kept + (1 - kept) * min(WHOLE / shape.layers, 1))
    return {
        "memory_bytes": memory,
        "context": {"full": _most(left, token * batch), "pruned": _most(left, peak * batch)},
        "batch": {"full": _most(left, token * context), "pruned": _most(left, peak * context)},
    }


def _most(left: float, each: float) -> int:
    return max(int(left // each), 0)
