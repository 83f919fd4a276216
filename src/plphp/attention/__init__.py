"""Attention over pruned layers, and the scores of prompt tokens. `choose` selects the code."""

from plphp.attention.choose import attend, coded_attention, decode_attention, side_by_side
from plphp.attention.scoring import last_token_probabilities, window_probabilities

__all__ = [
    "attend",
    "coded_attention",
    "decode_attention",
    "last_token_probabilities",
    "side_by_side",
    "window_probabilities",
]
