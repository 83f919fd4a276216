"""The optimizers: Muon for matrices, AdamW for all other parameters.

``torch.optim.Muon`` iterates in bfloat16. On a processor without bfloat16 units this takes twenty
times as long as float32. The Muon of this file iterates in a given dtype, and handles all matrices
of one shape at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

MOMENTUM, DECAY = 0.95, 0.02
QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al., 2024
ITERATIONS = 5
ADAMW_RMS = 0.2  # makes updates of Muon as large as those of AdamW (Liu et al., 2025)


class Muon(torch.optim.Optimizer):
    """Steps along the momentum with all its singular values set to about one. For matrices only."""

    def __init__(
        self, matrices: Iterable[Parameter], lr: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(matrices, {"lr": lr})
        self.dtype = dtype  # dtype of the Newton-Schulz iteration

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for alike in by_shape.values():
                self._update(alike, group["lr"])

    def _update(self, alike: list[Parameter], rate: float) -> None:
        looked_ahead = []
        for parameter in alike:
            grad = parameter.grad
            assert grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(grad)
            state["momentum"].lerp_(grad, 1 - MOMENTUM)
            looked_ahead.append(grad.lerp(state["momentum"], MOMENTUM))
        rows, columns = alike[0].shape
        size = rate * ADAMW_RMS * max(rows, columns) ** 0.5
        directions = orthogonal(torch.stack(looked_ahead).to(self.dtype)).to(alike[0].dtype)
        for parameter, direction in zip(alike, directions, strict=True):
            parameter.mul_(1 - rate * DECAY).sub_(direction, alpha=size)


def orthogonal(matrices: Tensor) -> Tensor:
    """The matrices [N, rows, columns] with singular values near one, by Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


class MuonAdamW:
    """Both optimizers as one. ``tables`` are embeddings and classes, which AdamW updates."""

    def __init__(
        self,
        weights: Iterable[Parameter],
        tables: Sequence[Parameter],
        rate: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        weights = list(weights)
        matrices = [weight for weight in weights if weight.ndim == 2]
        others = [weight for weight in weights if weight.ndim != 2] + list(tables)
        self.parameters, self.rate = matrices + others, rate
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, rate, dtype),
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

    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load(self, states: Sequence[dict[str, Any]]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
