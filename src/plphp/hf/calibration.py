"""Thresholds that fit a model: alpha and beta from its own vision attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from plphp.errors import InputError
from plphp.hf.attach import prune
from plphp.policy import PLPHP, calibrated


def calibrate(
    model: Any, samples: Iterable[Mapping[str, Any]], budget: float = 0.4, spread: float = 0.75
) -> PLPHP:
    """PLPHP whose layers fall into three equal classes on these prompts and keep `budget` together.

    model: one that `plphp.prune` takes and that is not attached
    samples: keyword arguments of `model.generate` for a prompt with images each, such as a
        processor's output; a few dozen are enough
    budget: mean share of vision K/V kept over layers and samples, 0 to 1
    spread: delta_r as a share of r, where r + delta_r leaves room for it

    alpha and beta are the 2/3 and 1/3 quantiles of gamma over all layers and samples: the paper's
    .25 and .1 put all layers of some models into one class. Which share a single prompt keeps
    still depends on it. Raises InputError without vision tokens, otherwise as `plphp.prune`.
    """
    gammas: list[float] = []
    with prune(model, PLPHP(r=1.0, delta_r=0.0)) as pruning, torch.inference_mode():
        for inputs in samples:
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert pruning.report is not None
            gammas += [g for layer in pruning.report.layers for g in layer.gamma if g == g]
    if not gammas:
        raise InputError("calibration needs samples with images: no vision token was found")
    return calibrated(gammas, budget, spread)
