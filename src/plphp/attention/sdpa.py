"""Attention over a pruned cache through PyTorch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    """Attention output (B, H, T, Dv); the arguments are those of `reference.attend`.

    The G query heads of a KV head are passed as G * T queries of one head, so that keys and values
    are read once and never repeated. If some threads of a CPU would then have no work, they are
    passed as P heads of G / P * T queries each; then P threads read the same keys and values.
    """
    batch, heads, queries, dim = q.shape
    groups = heads // k.shape[1]
    p = parts(batch * k.shape[1], groups, q.device)
    heads_in_part = groups // p
    packed = q.reshape(batch, k.shape[1] * p, heads_in_part * queries, dim)
    if visible is not None:
        if visible.shape[1] > 1:
            visible = visible.repeat_interleave(p, 1)
        if queries > 1:
            visible = visible.repeat(1, 1, heads_in_part, 1)
    out = F.scaled_dot_product_attention(
        packed, k, v, attn_mask=visible, scale=scale, enable_gqa=p > 1
    )
    return out.reshape(batch, heads, queries, -1)


def parts(tasks: int, groups: int, device: torch.device) -> int:
    """The number of parts P into which the G query heads of a KV head are cut, a divisor of G.

    tasks: rows times KV heads, to each of which PyTorch's CPU kernel gives one thread
    groups: G

    Measured with two threads and one KV head of 8 query heads, P = 2 takes a quarter of the time of
    P = 1, and half of the time of P = 8, which is what transformers does (dev/LOG.md, 2026-11-23).
    """
    if device.type != "cpu":
        return 1
    wanted = -(-_threads() // tasks)
    return next(p for p in range(1, groups + 1) if groups % p == 0 and (p >= wanted or p == groups))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _threads() -> int:
    """The number of CPU threads. torch.compile treats it as a constant."""
    return torch.get_num_threads()
