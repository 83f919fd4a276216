"""FastV (Chen et al. 2024, arXiv 2403.06764): after a few layers, half of the image is gone.

    s[j]  = mean_h p[h, j] in layer K - 1, p the attention of the last prompt token
    keep  = all text, and of V the top ceil(keep |V| - 1e-6) by s, in all layers from K on (from 0)

What leaves is not computed any further: the prompt gets faster, layers before K keep everything in
their caches. The paper ranks by the attention that a token receives from all others; its authors'
program, and this one, by what it receives from the last token.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import Look, SequencePolicy, check_count, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class FastV(SequencePolicy):
    """Image tokens leave the hidden states before one layer.

    layer: K, the first layer that does without them, at least 1
    keep: the share of vision tokens that stays, by default .5
    budget: the share of vision K/V kept over all layers, instead of `keep`; at least K / layers
    Raises ValueError, for a budget out of reach when the model is attached.
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
