"""FastV (Chen et al. 2024, arXiv 2403.06764): layers from K on compute half of the vision tokens.

    s[j]  = mean_h p[h, j] in layer K - 1, p the attention of the last prompt token
    keep  = all text, and of V the top ceil(keep |V| - 1e-6) by s, in all layers from K on (from 0)

Dropped tokens are not computed in layers from K on, so the prefill is faster. Layers before K keep
all tokens in their caches. The paper ranks a token by the attention that it receives from all other
tokens; its authors' program and this one rank it by the attention of the last prompt token.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import (
    Look,
    SequencePolicy,
    check_early,
    flat_look,
    layer_within,
    share_after,
)
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class FastV(SequencePolicy):
    """A share of the vision tokens leaves the hidden states before layer K (arXiv 2403.06764).

    layer: K, the first layer that does not compute the dropped tokens, at least 1
    keep: the share of vision tokens that stays from layer K on, 0 to 1; .5 by default
    budget: the share of vision K/V kept over all layers, in place of `keep`; at least K / layers
    Raises InputError, naming the field. A budget below K / layers is refused when a model is
    attached, because the number of layers is not known before.
    """

    layer: int = 2
    keep: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        check_early(self.layer, self.keep, self.budget)

    def leave_at(self, layers: int) -> int:
        return layer_within(self.layer, self.budget, layers)

    def look(self, view: LayerView) -> Look:
        keep = share_after(self.layer, self.keep, self.budget, view.layers)
        return flat_look(view, steps.shared_scores(view), keep)
