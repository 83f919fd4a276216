"""VTW, visual tokens withdrawal (Lin et al. 2024, arXiv 2405.05803): deep layers compute text only.

    keep = all text, and no vision token in any layer from K on (from 0)

Dropped tokens are not computed in layers from K on, so the prefill is faster. Layers before K keep
all tokens. The paper determines K from samples of a task; the default here is half of the layers,
which is what the paper finds for its models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plphp.errors import InputError
from plphp.policy.checks import check_count, check_share
from plphp.policy.hidden import HiddenPolicy, HiddenView


@dataclass(frozen=True)
class VTW(HiddenPolicy):
    """All vision tokens leave the hidden states before layer K (arXiv 2405.05803).

    layer: K, the first layer without vision tokens, at least 1; by default half of the layers
    budget: the share of vision K/V kept over all layers, 0 to 1, instead of `layer`: K is the layer
        that comes closest to it
    Raises InputError, naming the field, for a value out of range or for both options at once. A
    layer above the decoder's is refused when a model is attached.
    """

    layer: int | None = None
    budget: float | None = None  # type: ignore[assignment]  # None stands for `layer`
    min_tokens = 0
    reads_hidden = False

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_count("layer", self.layer, 1)
        if self.budget is not None:
            check_share("budget", self.budget)
            if self.layer is not None:
                raise InputError("budget and layer say the same thing: give one of them")

    def leave_at(self, layers: int) -> int:
        if self.budget is not None:
            return min(max(round(self.budget * layers), 1), layers)
        at = max(layers // 2, 1) if self.layer is None else self.layer
        if at > layers:
            raise InputError(f"layer must be at most {layers}, the decoder's layers, got {at}")
        return at

    def share(self, layers: int) -> float:
        return 0.0

    def scores(self, view: HiddenView, quota: Tensor) -> Tensor:
        return torch.zeros(view.spans.shape, device=view.spans.device)
