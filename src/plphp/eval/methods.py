"""The settings of a run: methods by name, each at several budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from plphp.errors import InputError
from plphp.hf import calibrate, compat
from plphp.policy import ALIASES, POLICIES, Policy, policy, sequence_stage
from plphp.policy.checks import meant_name, meant_share
from plphp.recall import HOMES, KeptBits, Recall

PAPER = ":paper"  # NAME:paper is a method with its own defaults instead of a budget
# POLICY+HOME is a policy with recall: the home parks what the policy drops, and the budget limits
# the device bytes. full+int4 parks all vision tokens and has no budget. It is the control.
PARKED = "+"
# POLICY+kv4 or +kv2 stores what the policy keeps in codes, and the budget counts device bytes.
BITS = {"kv4": 4, "kv2": 2}
STAGES = "/"  # FIRST/SECOND: two stages, a sequence method and then a cache method
CALIBRATED = ":calibrated"  # PLPHP with thresholds from this model's own vision attention
CONTROLS = ("full", "random", "uniform")  # these always run
BUDGETS = (0.6, 0.4, 0.2, 0.1)


@dataclass(frozen=True)
class Setting:
    """A method at a budget.

    budget: the share of vision K/V to keep, averaged over layers; with recall, that of device
        bytes. None for the defaults of the method
    """

    method: str
    budget: float | None

    @property
    def recall(self) -> Recall | None:
        """The options of recall, None for a method without recall.

        The budget counts the device bytes of all vision tokens. A home only has those that the
        first of two stages has left, so that its own budget is larger.
        """
        name, _, home = self.method.partition(PARKED)
        if not home or home in BITS:
            return None
        first = sequence_stage(policy(name)) if STAGES in name else None
        left = getattr(first, "budget", None) or 1.0
        return Recall(home, min((self.budget or 0) / left, 1.0))

    @property
    def kv_bits(self) -> int | None:
        """The bits of the codes of kept tokens, None where they are stored in full."""
        return BITS.get(self.method.partition(PARKED)[2])

    def described(self, made: Policy) -> str:
        """The options of this method in text. made: the policy of this setting"""
        if self.recall is not None:
            return f"{made!r}, which only ranks tokens, with {self.recall!r}"
        return repr(made) if self.kv_bits is None else f"{made!r} with kv_bits={self.kv_bits}"

    def __str__(self) -> str:
        return self.method if self.budget is None else f"{self.method} at {self.budget:g}"


FULL = Setting("full", 1.0)


def known_methods() -> list[str]:
    """The names that `parse` takes, without NAME:paper of methods other than plphp."""
    return [*POLICIES, f"plphp{PAPER}", f"plphp{CALIBRATED}"]


def parse(methods: str, budgets: str) -> tuple[list[Setting], list[str]]:
    """The settings for comma-separated names and shares, and the controls that were added.

    The first setting is `full`. Raises InputError for an unknown name, and for a budget that is not
    above 0 and at most 1.
    """
    names = list(dict.fromkeys(map(_full_name, _split(methods, "--methods"))))
    for name in names:
        base, _, home = name.removesuffix(PAPER).partition(PARKED)
        right = base in POLICIES or name == f"plphp{CALIBRATED}" or _in_stages(base)
        if not right or (home and home not in (*HOMES, *BITS)) or name.endswith(PARKED):
            known = ", ".join([*known_methods(), *ALIASES])
            meant = meant_name(base, [*POLICIES, *ALIASES])
            raise InputError(
                f"--methods: unknown method {name!r}{meant}; known are {known}, FIRST/SECOND for "
                f"two stages, and NAME+HOME with recall from {', '.join(HOMES)}, or in codes "
                f"with {' or '.join(BITS)}"
            )
        _check_home(name)
    added = [name for name in CONTROLS if name not in names]
    shares = [_share(text) for text in _split(budgets, "--budgets")]
    settings = [FULL]
    for name in [*names, *added]:
        if name.endswith(PAPER) or name.startswith(f"full{PARKED}"):
            settings.append(Setting(name, None))
        elif name != "full":
            # A budget of 1 keeps all tokens, and "full" does that already.
            settings += [Setting(name, share) for share in dict.fromkeys(shares) if share < 1]
    return settings, [name for name in added if name != "full"]


def _check_home(name: str) -> None:
    """Raise InputError for full+HOME with a home that cannot park all vision tokens."""
    base, _, home = name.partition(PARKED)
    if base != "full" or home not in HOMES:
        return
    try:
        Recall(home, 0)
    except ValueError as error:
        raise InputError(f"--methods: {name} parks all vision tokens: {error}") from None


def _full_name(name: str) -> str:
    """The name of a method, with an alias such as "recommended" replaced by the method's name."""
    for alias, own in ALIASES.items():
        if name == alias or name.startswith((alias + PAPER, alias + PARKED)):
            return own + name.removeprefix(alias)
    return name


def _in_stages(name: str) -> bool:
    """Whether a name such as "divprune:.25/plphp" names two stages. Raises InputError for others.

    A method without such a mark is no error here.
    """
    if STAGES not in name:
        return False
    try:
        policy(name)
    except ValueError as error:
        raise InputError(f"--methods: {error}") from None
    return True


def make(setting: Setting, model: Any, samples: Sequence[Mapping[str, Any]] = ()) -> Policy:
    """The policy of a setting.

    samples: arguments of generate(), with which thresholds are calibrated
    Raises ValueError if the method cannot reach the budget.
    """
    if setting.method == f"plphp{CALIBRATED}" and setting.budget is not None:
        # The thresholds fit the average prompt. The budget holds for each prompt, as it does for
        # the other methods.
        return replace(calibrate(model, samples, budget=setting.budget), budget=setting.budget)
    name = setting.method.removesuffix(PAPER)
    if setting.recall is not None:  # the budget is that of recall, and the policy only ranks tokens
        return policy(name.partition(PARKED)[0])
    budget = setting.budget
    if setting.kv_bits is not None:
        name = name.partition(PARKED)[0]
        if budget is not None:
            dim = compat.head_dim(compat.text_config(model))
            each = KeptBits(setting.kv_bits).share(dim, model.dtype.itemsize)
            budget = min(budget / each, 1.0)
    return policy(name) if budget is None else policy(name, budget=budget)


def _split(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError(f"{option} is empty: give at least one name or number")
    return parts


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        raise InputError(f"--budgets: {text!r} is not a number{meant_share(text)}") from None
    if not 0 < share <= 1:
        hint = meant_share(text)
        raise InputError(f"--budgets: {text} must be above 0 and at most 1{hint}")
    return share
