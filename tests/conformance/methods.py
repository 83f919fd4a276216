"""The policies of the matrix: every registered one, and the options of PLPHP one by one.

For a policy whose selection the oracle does not know, the oracle decodes with the reported
selection, and the policy is compared with itself in other modes. The same is done for the tokens
that recall reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import plphp
from invariants import plphp_policy
from oracle import Numbers
from plphp.policy import POLICIES

OPTIONS: dict[str, dict[str, object]] = {
    "plphp": {},
    "plphp global": {"budget": "global"},
    "plphp max": {"gqa": "max"},
    "plphp floor": {"min_tokens": 9},
    "plphp paged": {"round_to": 8},
    "plphp all options": {"budget": "global", "gqa": "max", "min_tokens": 5, "round_to": 8},
}


@dataclass(frozen=True)
class Method:
    """A policy of the matrix.

    make: makes the policy, given thresholds that fit the model
    options: how the oracle selects, None if it cannot
    recall: where dropped tokens are parked, None if they are lost
    kv_bits: bits of the codes of kept tokens, None if they are stored in full
    """

    name: str
    make: Callable[[Numbers], Any]
    options: dict[str, object] | None = field(default=None, hash=False)
    recall: plphp.Recall | None = None
    kv_bits: int | None = None

    def attach(self, model: Any, numbers: Numbers, mask: Any = None) -> Any:
        """Call `plphp.prune` for a method."""
        policy = self.make(numbers)
        return plphp.prune(
            model, policy, vision_mask=mask, recall=self.recall, kv_bits=self.kv_bits
        )


def _plphp(name: str, options: dict[str, object]) -> Method:
    return Method(name, lambda numbers: plphp_policy(replace(numbers, **options)), options)


def _other(name: str) -> Method:
    return Method(name, lambda numbers: POLICIES[name]())


def prunes_the_cache(name: str) -> bool:
    """Whether a method prunes the cache. Other kinds have invariants of their own."""
    return POLICIES[name]().prunes_cache


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(_plphp(name, options) for name, options in OPTIONS.items()),
        *(_other(name) for name in POLICIES if name != "plphp" and prunes_the_cache(name)),
    )
}

# Budgets so small that every prompt of the matrix parks most of its vision tokens
HOMES = {"host": plphp.Recall("host", 0.4, record=True), "int4": plphp.Recall("int4", 0.4)}


def method(name: str) -> Method:
    """The method of a name; a name that ends with +host or +int4 is with recall."""
    policy, _, home = name.partition("+")
    found = METHODS[policy]
    return replace(found, name=name, options=None, recall=HOMES[home]) if home else found


def goes_with_recall(name: str) -> bool:
    """Whether a method has no option that says what an image keeps, which recall refuses."""
    return not {"budget", "min_tokens", "round_to"} & {*OPTIONS.get(name, {})}


def home_of(name: str) -> str:
    return name.partition("+")[2]
