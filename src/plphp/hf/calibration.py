"""Finds the thresholds alpha and beta that fit a model, from its own vision attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from plphp.errors import InputError, InputTypeError
from plphp.hf.attach import prune
from plphp.policy import PLPHP, calibrated

FEW = 8  # prompts; from fewer, the thresholds say more of these prompts than of the model


def calibrate(
    model: Any, samples: Iterable[Mapping[str, Any]], budget: float = 0.4, spread: float = 0.75
) -> PLPHP:
    """Make a PLPHP policy whose thresholds and rates are fitted to a model.

    model: a model that `plphp.prune` accepts and that is not attached
    samples: keyword arguments of `model.generate`, one mapping a prompt with images, such as a
        processor's output. A few dozen prompts are enough; fewer than 8
        give a warning
    budget: share of vision K/V to keep, in the mean over layers and samples, 0 to 1
    spread: delta_r as a share of r. delta_r is smaller where r + delta_r would be above 1

    alpha and beta are the 2/3 and 1/3 quantiles of gamma over all layers and samples, so that a
    third of the layers falls into each class. With the paper's thresholds .25 and .1 all layers of
    some models are in one class. The share that a single prompt keeps still depends on its gammas.

    Raises InputTypeError for samples that are no mappings, InputError if no sample has vision
    tokens and for a budget or a spread out of range, and otherwise as `plphp.prune`.
    Source: plphp's own; the paper gives fixed thresholds.
    """
    if isinstance(samples, Mapping):
        raise InputTypeError("samples must be several prompts, got one: give a list of them")
    gammas: list[float] = []
    prompts = 0
    with prune(model, PLPHP(r=1.0, delta_r=0.0)) as pruning, torch.inference_mode():
        for inputs in samples:
            if not isinstance(inputs, Mapping):
                raise InputTypeError(
                    "each of the samples must be a mapping, such as a processor's output, got "
                    f"{type(inputs).__name__}"
                )
            model.generate(**inputs, max_new_tokens=1, do_sample=False)
            assert pruning.report is not None
            prompts += sum(images > 0 for images in pruning.report.images)
            gammas += [g for layer in pruning.report.layers for g in layer.gamma if g == g]
    if not gammas:
        raise InputError("calibration needs samples with images: no vision token was found")
    if prompts < FEW:
        warnings.warn(
            f"calibration on {prompts} prompts with images: give a few dozen, so that the "
            "thresholds fit other prompts too",
            UserWarning,
            stacklevel=2,
        )
    return calibrated(gammas, budget, spread)
