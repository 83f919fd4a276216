"""Muon for matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn import Parameter


class MuonAdamW:
    """Two optimizers as one; ``tables`` (embeddings, classes) are no matrices to Muon."""

    def __init__(
        self, weights: Iterable[Parameter], tables: Sequence[Parameter], rate: float
    ) -> None:
        weights = list(weights)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2] + list(tables)
        self.parameters, self.rate = matrices + others, rate
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, factor: float) -> None:
        """Update at ``factor`` times the full rate, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
