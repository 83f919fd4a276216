"""The policies of the matrix: every registered one, and PLPHP's options one by one.

A policy of which the oracle knows no selection is held against the oracle's decoding of what it
says it keeps, and against itself in other circumstances.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from invariants import plphp_policy
from oracle import Numbers
from plphp.policy import POLICIES

OPTIONS: dict[str, dict[str, object]] = {
    "plphp": {},
    "plphp global": {"budget": "global"},
    "plphp max": {"gqa": "max"},
    "plphp floor": {"min_tokens": 9},
    "plphp paged": {"round_to": 16},
    "plphp all options": {"budget": "global", "gqa": "max", "min_tokens": 5, "round_to": 8},
}


@dataclass(frozen=True)
class Method:
    """make: the policy, given thresholds that fit the model
    options: how the oracle selects, None where it cannot
    """

    name: str
    make: Callable[[Numbers], Any]
    options: dict[str, object] | None = field(default=None, hash=False)


def _plphp(name: str, options: dict[str, object]) -> Method:
    return Method(name, lambda numbers: plphp_policy(replace(numbers, **options)), options)


def _other(name: str) -> Method:
    return Method(name, lambda numbers: POLICIES[name]())


def prunes_the_cache(name: str) -> bool:
    """Methods of the other kinds have invariants and tests of their own."""
    return POLICIES[name]().kind in ("layer", "layers")


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(_plphp(name, options) for name, options in OPTIONS.items()),
        *(_other(name) for name in POLICIES if name != "plphp" and prunes_the_cache(name)),
    )
}
