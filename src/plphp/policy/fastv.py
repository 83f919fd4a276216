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
from plphp.policy.base import Look, SequencePolicy, check_count, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class FastV(SequencePolicy):
    """A share of the vision tokens leaves the hidden states before layer K (arXiv 2403.06764).

    layer: K, the first layer that does not compute the dropped tokens, at least 1
    keep: the share of vision tokens that stays from layer K on, 0 to 1; .5 by default
    budget: the share of vision K/V kept over all layers, in place of `keep`; at least K / layers
    Raises ValueError, naming the field. A budget below K / layers is refused when a model is
    attached, because the number of layers is not known before.
    """

    layer: int = 2
    keep: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        check_count("layer", self.layer, 1)
        for name in ("keep", "budget"):
            if getattr(self, name) is not None:
                check_share(name, getattr(self, name))
        if self.keep is not None and self.budget is not None:
            raise ValueError("budget and keep say the same thing: give one of them")

    def leave_at(self, layers: int) -> int:
        if self.layer >= layers:
            raise ValueError(f"layer must be below the decoder's {layers} layers, got {self.layer}")
        least = self.layer / layers
        if self.budget is not None and self.budget < least - 1e-9:
            raise ValueError(
                f"budget must be at least layer / layers = {self.layer} / {layers}, got "
                f"{self.budget}: earlier layers keep everything; take a smaller layer"
            )
        return self.layer

    def look(self, view: LayerView) -> Look:
        layers = view.layers
        keep = 0.5 if self.keep is None else self.keep
        if self.budget is not None:
            keep = max(self.budget * layers - self.layer, 0.0) / (layers - self.layer)
        return flat_look(view, steps.shared_scores(view), keep)
