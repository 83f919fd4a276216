"""Two stages: a sequence method drops tokens first, then a cache method prunes what is left.

The sequence method decides which vision tokens a layer computes at all, and the cache method which
of these each KV head keeps. The shares multiply: half of the tokens, and .4 of those in the cache,
are .2 of the vision K/V. In layers before the sequence method's, the cache method sees all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from plphp.errors import InputError
from plphp.policy.base import CachePolicy, Kind, Policy, SequencePolicy
from plphp.policy.checks import check_share


@dataclass(frozen=True)
class Stages(Policy):
    """One sequence method before one cache method.

    Raises InputError for policies of other kinds or in another order.
    """

    first: SequencePolicy
    second: CachePolicy

    def __post_init__(self) -> None:
        fits = isinstance(self.first, SequencePolicy) and isinstance(self.second, CachePolicy)
        if not fits:
            got = f"{type(self.first).__name__}, {type(self.second).__name__}"
            swapped = isinstance(self.second, SequencePolicy) and isinstance(
                self.first, CachePolicy
            )
            raise InputError(
                "two stages are a sequence method such as divprune, then a cache method such as "
                f"plphp; got {got}" + (": give them in the other order" if swapped else "")
            )

    @property
    def kind(self) -> Kind:
        """Always "sequence": the prompt's forward is changed."""
        return "sequence"

    @property
    def window(self) -> int:
        return self.second.window

    def check(self, layers: int) -> None:
        self.first.check(layers)
        self.second.check(layers)


def in_stages(policies: Sequence[Policy]) -> Policy:
    """One policy from a list of one policy, or of two stages. Raises InputError for others."""
    if len(policies) == 1:
        return policies[0]
    if len(policies) != 2:
        raise InputError(
            "a list of policies is one policy, or a sequence method and then a cache method; got "
            f"{len(policies)}"
        )
    first, second = policies
    return Stages(first, second)  # type: ignore[arg-type]  # checked there


def sequence_stage(policy: Policy) -> SequencePolicy | None:
    """The part of a policy that drops hidden states, or None."""
    if isinstance(policy, Stages):
        return policy.first
    return policy if isinstance(policy, SequencePolicy) else None


def cache_stage(policy: Policy) -> Policy | None:
    """The part of a policy that prunes the cache, or None."""
    if isinstance(policy, Stages):
        return policy.second
    return None if isinstance(policy, SequencePolicy) else policy


def named(name: str, make: Any, options: dict[str, Any]) -> Policy:
    """One policy or two stages by name, such as "divprune:.25" or "divprune:.25,plphp".

    make: makes one policy from its name and options
    options: of the last stage, but for `budget` (float), which is the share of vision K/V that
        both stages leave: the second keeps budget / (the first stage's share)
    Raises InputError for a name or option that does not fit, and for a budget above the first
    stage's share.
    """
    parts = [part.strip() for part in name.replace("/", ",").split(",")]
    if len(parts) > 2 or "" in parts:
        raise InputError(f"{name!r} must name a sequence method and a cache method, in this order")
    own, _, share = parts[0].partition(":")
    try:
        first: Policy = make(
            own, **(_shared(share) if share else {}), **({} if parts[1:] else options)
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"{parts[0]!r}: {error}") from None
    if len(parts) == 1:
        return first
    if ":" in parts[1]:
        raise InputError(
            f"{parts[1]!r}: give the share of both stages together as the budget, from which that "
            "of the second follows"
        )
    budget = options.get("budget")
    if isinstance(budget, int | float) and not isinstance(budget, bool):
        check_share("budget", budget)
        of_first = getattr(first, "budget", None)
        if of_first is None:
            raise InputError(
                f"the budget of both stages needs the share of the first: name it, as in "
                f"'{own}:.5,{parts[1]}'"
            )
        if budget > of_first + 1e-9:
            raise InputError(
                f"budget must be at most the share of the first stage, {of_first}, got {budget}: "
                f"give the first stage a larger one, as in '{own}:{budget:g},{parts[1]}'"
            )
        options = {**options, "budget": min(budget / of_first, 1.0) if of_first else 1.0}
    return in_stages([first, make(parts[1], **options)])


def _shared(share: str) -> dict[str, float]:
    """The option that a share after the name of a policy stands for."""
    try:
        return {"budget": float(share)}
    except ValueError:
        raise InputError(f"the share after ':' must be a number, got {share!r}") from None
