"""What a user says about recall: where dropped tokens go and how many bytes the device may hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from plphp.policy.base import check_choice, check_count, check_share

GROUP = 32  # tokens of a channel of the keys that share a range, in codes
RANGE_BYTES = 4  # of a range: step and lowest number in float16

Home = Literal["host", "int4", "int2"]
HOMES: tuple[Home, ...] = get_args(Home)


@dataclass(frozen=True)
class Recall:
    """Park what a policy drops instead of destroying it.

    home: "host": keys and values lie in main memory; a small index of the keys stays on the device,
        and at every step each KV head fetches the tokens that its query looks for.
        "int4", "int2": they stay on the device in 4 or 2 bits and are all read at every step
    budget: device bytes of the vision tokens, index and codes included, over those of the full
        cache in the model's dtype, above 0 to 1, of all layers together: the first third hold
        twice as many tokens in full. 1 parks nothing; with "int4" and "int2", 0 holds nothing in
        full
    rank: host only: components of a key in the index, 4 bits each; a quarter of the head by default
    every: host only: choose at every so many-th token. 1 is what accuracy wants (docs/recall.md)
    record: keep which tokens every head read at every step, on the CPU, in `PrunedCache.recalled()`
    Raises ValueError.
    """

    home: Home = "host"
    budget: float = 0.4
    rank: int | None = None
    every: int = 1
    record: bool = False

    def __post_init__(self) -> None:
        check_choice("home", self.home, HOMES)
        check_share("budget", self.budget)
        if self.budget == 0 and self.home == "host":
            raise ValueError("budget must be above 0: a step reads what the device holds")
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        check_count("every", self.every, 1)
        for name in ("rank", "every", "record"):
            if (
                self.home != "host"
                and getattr(self, name) != Recall.__dataclass_fields__[name].default
            ):
                raise ValueError(f"{name} is for home='host': {self.home!r} reads every token")

    def least_share(self, dim: int, itemsize: int) -> float:
        """What codes take of full keys and values of `dim` components each, as the prompt grows."""
        if self.bits is None:
            return 0.0
        ranges = RANGE_BYTES * (1 / GROUP + 1 / dim) / 2
        return (self.bits / 8 + ranges) / itemsize

    @property
    def bits(self) -> int | None:
        """Bits of a parked number on the device, None for the host."""
        return {"int4": 4, "int2": 2}.get(self.home)


def as_recall(given: Recall | str | None) -> Recall | None:
    """The options behind a home's name. Raises ValueError."""
    return Recall(home=given) if isinstance(given, str) else given  # type: ignore[arg-type]
