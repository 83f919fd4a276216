"""HOW tokens are scored and attended. The choice between implementations is made here."""

from __future__ import annotations

from torch import Tensor

from plphp.attention import reference, sdpa
from plphp.attention.scoring import last_token_probabilities, window_probabilities

__all__ = ["attend", "last_token_probabilities", "window_probabilities"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float | None = None,
) -> Tensor:
    """Attention output (B, H, T, Dv) of new tokens over a pruned cache; see `reference.attend`."""
    if softcap is not None:  # SDPA has no soft-capping
        return reference.attend(q, k, v, visible, scale, softcap)
    return sdpa.attend(q, k, v, visible, scale)
