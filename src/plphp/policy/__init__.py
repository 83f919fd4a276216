"""Pruning policies: which tokens to keep. Pure tensor functions and small frozen dataclasses.

This package imports torch only. The package can be called: `plphp.policy("snapkv", budget=.2)` is
`plphp.policy.policy("snapkv", budget=.2)`, which raises InputError for an unknown name or option.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from plphp.errors import InputError, InputTypeError
from plphp.policy.base import CachePolicy, Look, Policy, SequencePolicy, plan_views
from plphp.policy.cdpruner import CDPruner
from plphp.policy.checks import meant_name
from plphp.policy.dart import DART
from plphp.policy.divprune import DivPrune
from plphp.policy.downsample import Downsample
from plphp.policy.fastv import FastV
from plphp.policy.full import Full
from plphp.policy.hidden import HiddenPolicy, HiddenView, TowerView
from plphp.policy.novelty import Novelty
from plphp.policy.plphp import PLPHP, calibrated
from plphp.policy.plphp_flat import PLPHPFlat
from plphp.policy.plphp_global import PLPHPGlobal
from plphp.policy.plphp_shared import PLPHPShared
from plphp.policy.pyramidkv import PyramidKV
from plphp.policy.random import Random
from plphp.policy.snapkv import SnapKV
from plphp.policy.stages import Stages, cache_stage, in_stages, named, sequence_stage
from plphp.policy.tgv_kv import TGVKV
from plphp.policy.uniform import Uniform
from plphp.policy.vidcom2 import VidCom2
from plphp.policy.view import LAYER_CLASSES, KeepPlan, LayerView
from plphp.policy.visionzip import VisionZip
from plphp.policy.vl_cache import VLCache
from plphp.policy.vtw import VTW

POLICIES: dict[str, Any] = {
    "full": Full,
    "plphp": PLPHP,
    "plphp-shared": PLPHPShared,
    "plphp-flat": PLPHPFlat,
    "plphp-global": PLPHPGlobal,
    "random": Random,
    "uniform": Uniform,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "vl-cache": VLCache,
    "tgv-kv": TGVKV,
    "novelty": Novelty,
    "fastv": FastV,
    "vtw": VTW,
    "divprune": DivPrune,
    "cdpruner": CDPruner,
    "dart": DART,
    "vidcom2": VidCom2,
    "visionzip": VisionZip,
    "downsample": Downsample,
}

# The recommended policy was chosen on other samples than those that docs/accuracy.md reports.
ALIASES = {"recommended": "novelty"}

__all__ = [
    "ALIASES",
    "LAYER_CLASSES",
    "PLPHP",
    "POLICIES",
    "CachePolicy",
    "HiddenPolicy",
    "HiddenView",
    "KeepPlan",
    "LayerView",
    "Look",
    "Policy",
    "SequencePolicy",
    "Stages",
    "TowerView",
    "cache_stage",
    "calibrated",
    "in_stages",
    "plan_views",
    "policy",
    "sequence_stage",
]


def policy(name: str, **options: Any) -> Policy:
    """Make a policy by name: `policy("plphp", r=.3)`, `policy("snapkv", budget=.2)`.

    Every policy has the option `budget`, the share of vision K/V kept over all layers, 0 to 1.
    "recommended" is the best policy that we know among those that select tokens once, at the end
    of the prompt; see docs/methods.md. Two names make two stages: `policy("divprune,plphp")`, or
    `policy("divprune:.25,plphp")` with the share that the first stage leaves. Raises InputError,
    naming it, for an unknown name, an unknown option or a value out of range. "divprune:.25" is
    `policy("divprune", budget=.25)`. Raises InputTypeError for a name that is no text.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"a policy has a name such as 'snapkv', got {name!r}")
    if any(mark in name for mark in ",/:"):
        return named(name, policy, options)
    name = ALIASES.get(name, name)
    if name not in POLICIES:
        known = sorted([*POLICIES, *ALIASES])
        meant = meant_name(name, known)
        raise InputError(f"unknown policy {name!r}{meant}; known are {', '.join(known)}")
    known = POLICIES[name].__dataclass_fields__
    for option in options:
        if option not in known:
            raise InputError(f"policy {name!r} has no option {option!r}; it has {', '.join(known)}")
    made: Policy = POLICIES[name](**options)
    return made


class _Callable(ModuleType):
    """This package, which is also the function that users know as `plphp.policy("name")`.

    A function of that name in `plphp` would hide the package from `import plphp.policy as P`.
    """

    def __call__(self, name: str, **options: Any) -> Policy:
        return policy(name, **options)


_Callable.__call__.__doc__ = policy.__doc__
sys.modules[__name__].__class__ = _Callable
