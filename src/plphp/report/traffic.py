"""What recall holds where, and what it moves, as numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RecallReport:
    """Bytes of the vision tokens of one conversation, over its layers, and the traffic since.

    home, budget: as asked for
    full: keys and values of all vision tokens in the model's dtype
    resident: of those that lie on the device in full; device: of all that lies there, in full, in
        codes and in the index. These three leave out what fills up unequal rows of a batch
    parked: allocated for the codes, or in main memory for all vision tokens
    index: allocated on the device to find or to number them, what fills up rows included
    fetched: tokens that each layer fetched at each step since, all rows and KV heads together; the
        lists go on growing while the answer is written
    token_bytes: what one fetched token moves
    where: the place of the parked tokens, such as "in main memory"
    read: as `PrunedCache.recalled()` returns it; these lists go on growing too
    """

    home: str
    budget: float
    full: int
    resident: int
    device: int
    parked: int
    index: int
    token_bytes: int = 0
    where: str = ""
    fetched: tuple[list[int], ...] = field(default=(), repr=False)
    read: tuple[list[Tensor], ...] = field(default=(), repr=False, compare=False)

    @property
    def share(self) -> float:
        """Device bytes of vision tokens over those of the full cache; 1 without any."""
        return self.device / self.full if self.full else 1.0

    @property
    def whereabouts(self) -> str:
        """What lies where: in full on the device, in main memory, or in codes on the device."""
        share = self.resident / self.full if self.full else 1.0
        rest = "all of it in main memory" if self.home == "host" else f"the rest there {self.where}"
        return f"{share:.1%} of vision K/V in full on the device, {rest}"

    @property
    def steps(self) -> int:
        """Tokens read since, guesses that were taken back included."""
        return max((len(layer) for layer in self.fetched), default=0)

    @property
    def transferred(self) -> float:
        """Bytes from main memory to the device a token, mean over the steps since."""
        return sum(map(sum, self.fetched)) * self.token_bytes / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        names = ("home", "budget", "full", "resident", "device", "parked", "index")
        numbers = {name: getattr(self, name) for name in names}
        return {**numbers, "share": self.share, "transferred_per_token": self.transferred}

    def __str__(self) -> str:
        return (
            f"recall: {self.resident:,} bytes of vision K/V in full, {self.index:,} of index, "
            f"{self.parked:,} parked {self.where}: {self.share:.1%} of the full bytes on the device"
        )
