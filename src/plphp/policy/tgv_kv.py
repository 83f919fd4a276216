"""TGV-KV (2026, arXiv 2606.03075) for vision tokens: the text weighs what each layer keeps.

    T      = the prompt tokens after the last vision token; a = attention, mean over heads
    w[t]   = sum over i in T, i >= t, of a[i, t]  /  |{i in T, i >= t}|       weight of a text token
    s[j]   = sum over t in T of  w[t] a[t, j]                        one ranking for all heads
    c_l    = sum over t in T and j in V of  a_l[t, j]                text-vision attention
    r_l    = budget L c_l / sum_k c_k, at most 1
    keep   = all text, and of V the top ceil(r_l |V| - 1e-6) by s

The formulas are those of the authors' program (github.com/Danielement321/TGV-KV). It counts the
budget over text and vision tokens, drops text too where the budget leaves no vision token, and
evicts more while it decodes. Here the budget counts vision tokens, all text is kept, nothing is
evicted later, and what a layer with rate 1 cannot use goes to the other layers. Only the last
`window` prompt tokens are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plphp.policy.base import CachePolicy, Kind, Look, Scope, flat_look
from plphp.policy.checks import check_count, check_share
from plphp.policy.view import LayerView
from plphp.policy.vl_cache import post_vision


@dataclass(frozen=True)
class TGVKV(CachePolicy):
    """Layer rates and a ranking from the attention of the text after the images (2606.03075).

    budget: the share of vision K/V kept over all layers, 0 to 1
    window: the number of last prompt tokens whose attention is read; of these, the tokens after
        the last vision token count, and always the last token
    Raises InputError, naming the field, for a value out of range.
    """

    budget: float = 0.4
    window: int = 64

    def __post_init__(self) -> None:
        check_share("budget", self.budget)
        check_count("window", self.window, 1)

    @property
    def kind(self) -> Kind:
        return "layers"

    @property
    def scope(self) -> Scope:  # type: ignore[override]
        return "global"

    def look(self, view: LayerView) -> Look:
        assert view.window is not None and view.asked is not None
        asks = post_vision(view.spans, view.asked)
        attention = view.over_ranks(view.window.mean(1)) * asks[..., None]
        scores = (text_weights(attention, view.asked, asks)[:, None] @ attention)[:, 0]
        crossing = (attention * (view.spans > 0)[:, None]).sum((1, 2))
        look = flat_look(view, scores[:, None].expand(-1, view.kv_heads, -1), 1.0)
        return replace(look, rate=crossing.double().masked_fill(look.rate.isnan(), torch.nan))


def text_weights(attention: Tensor, asked: Tensor, asks: Tensor) -> Tensor:
    """The mean attention (B, W) that each text token gets from those that can attend to it.

    attention: (B, W, N), zero for tokens that do not count; asked: (B, W) int64 their columns;
    asks: (B, W) bool, which of them count
    """
    columns = asked.clamp(min=0)[:, None].expand(-1, asked.shape[1], -1)
    among = attention.gather(2, columns) * asks[:, None]
    later = asks.flip(-1).cumsum(-1).flip(-1)  # how many of the tokens are at or after each
    return among.sum(1) / later.clamp(min=1)
