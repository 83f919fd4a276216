"""What fits into a memory: the longest context and the largest batch, pruned and not."""

from __future__ import annotations

from typing import Any

from plphp.bench.shapes import Shape
from plphp.cache import slack

WHOLE = 2  # layers that may hold the whole prompt at once while it is read


def fits(
    shape: Shape, memory: int, rate: float, size: int, context: int, batch: int
) -> dict[str, Any]:
    """Tokens of context for `batch` rows, and rows of `context` tokens, beside the weights.

    memory: bytes; rate: mean kept share of the prompt; size: bytes of a number. A pruned prompt
    holds the kept share of all layers with its slack, and up to two layers whole while it is read.
    What a forward itself needs (hidden states, logits) is left out, the same for both.
    """
    left = memory - size * (shape.parameters + shape.vocabulary * shape.hidden)
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
