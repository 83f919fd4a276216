"""VTW, visual tokens withdrawal (Lin et al. 2024, arXiv 2405.05803): deep layers see no image.

    keep = all text, and no vision token in any layer from K on (from 0)

What leaves is not computed any further: the prompt gets faster, layers before K keep everything.
The paper finds K on samples of a task; by default it is half of the layers, as it is there for the
models of its experiments.
"""

from __future__ import annotations

from dataclasses import dataclass

from plphp.policy import steps
from plphp.policy.base import Look, SequencePolicy, check_count, check_share, flat_look
from plphp.policy.view import LayerView


@dataclass(frozen=True)
class VTW(SequencePolicy):
    """All image tokens leave the hidden states before one layer.

    layer: K, the first layer that does without them, at least 1; by default half of the layers
    budget: the share of vision K/V kept over all layers, instead of `layer`: the nearest K
    Raises ValueError.
    """

    layer: int | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_count("layer", self.layer, 1)
        if self.budget is not None:
            check_share("budget", self.budget)
            if self.layer is not None:
                raise ValueError("budget and layer say the same thing: give one of them")

    def leave_at(self, layers: int) -> int:
        if self.budget is not None:
            return min(max(round(self.budget * layers), 1), layers)
        at = max(layers // 2, 1) if self.layer is None else self.layer
        if at > layers:
            raise ValueError(f"layer must be at most the decoder's {layers} layers, got {at}")
        return at

    def look(self, view: LayerView) -> Look:
        return flat_look(view, steps.shared_scores(view), 0.0)
