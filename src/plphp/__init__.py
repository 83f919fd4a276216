"""PLPHP: per-layer, per-head vision token pruning for large vision-language models.

    policy = plphp.PLPHP(r=0.4, delta_r=0.3, alpha=0.25, beta=0.1)
    with plphp.prune(model, policy) as pruning:
        out = model.generate(**inputs, max_new_tokens=128)
        print(pruning.report)

Method: Meng et al. 2025, arXiv 2502.14504.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from plphp._drawing import draw_with
from plphp._version import __version__
from plphp.errors import (
    InputError,
    InputTypeError,
    PlphpError,
    UnsupportedModeError,
    UnsupportedModelError,
    UnsupportedTransformersError,
)

if TYPE_CHECKING:
    from plphp.hf import PrunedCache, Pruning, calibrate, prune
    from plphp.hf.attached import attached
    from plphp.inspector import inspect
    from plphp.models import vision_spans
    from plphp.policy import PLPHP, policy
    from plphp.recall import Recall
    from plphp.report import Drawing, LayerReport, Report

__all__ = [
    "PLPHP",
    "InputError",
    "InputTypeError",
    "LayerReport",
    "PlphpError",
    "PrunedCache",
    "Pruning",
    "Recall",
    "Report",
    "UnsupportedModeError",
    "UnsupportedModelError",
    "UnsupportedTransformersError",
    "__version__",
    "attached",
    "calibrate",
    "inspect",
    "policy",
    "prune",
    "vision_spans",
]

# Imported on first use, because the imports of torch and transformers take seconds.
_LATER = {
    "LayerReport": "plphp.report",
    "PLPHP": "plphp.policy",
    "PrunedCache": "plphp.hf",
    "Pruning": "plphp.hf",
    "Recall": "plphp.recall",
    "Report": "plphp.report",
    "attached": "plphp.hf.attached",
    "calibrate": "plphp.hf",
    "inspect": "plphp.inspector",
    "policy": "plphp.policy",
    "prune": "plphp.hf",
    "vision_spans": "plphp.models",
}

# The one logger of plphp. Without a handler of the application it prints nothing.
logging.getLogger("plphp").addHandler(logging.NullHandler())


def _inspector() -> Drawing:
    """The functions that draw reports, imported when the first report is drawn."""
    from plphp import inspector

    return inspector


draw_with(_inspector)


def __getattr__(name: str) -> Any:
    if name in ("policy", "vllm"):  # packages; `plphp.policy` can also be called
        return import_module(f"plphp.{name}")
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'plphp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LATER])
