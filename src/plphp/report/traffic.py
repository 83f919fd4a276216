"""The bytes of vision tokens with recall (and how many are fetched), and with kept codes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

RECENT = 32  # text tokens at the end of a prompt that are never stored in codes


@dataclass(frozen=True, eq=False)
class RecallReport:
    """Bytes of the vision tokens of a conversation, summed over layers, and how many are fetched.

    home, budget: the options of `Recall`
    full: bytes of the keys and values of all vision tokens, in the model's dtype
    resident: bytes of the vision tokens that are stored in full on the device
    device: device bytes of the vision tokens: in full, in codes and in the index. `full`,
        `resident` and `device` do not count fillers
    parked: bytes allocated for codes, or in main memory
    index: bytes allocated for the index, which `host` alone has, and for the numbers of tokens,
        fillers included. Beside codes these numbers are in main memory and not part of `device`
    token_bytes: bytes that are copied for one fetched token
    where: the place of the parked tokens, such as "in main memory"
    fetched: for each layer a list with the number of tokens fetched at each step since the prompt,
        over all rows and KV heads. The lists grow during decoding
    read: as `PrunedCache.recalled()` returns it. These lists grow during decoding too
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
        """Device bytes as a share of the bytes of the full cache; 1 without vision tokens."""
        return self.device / self.full if self.full else 1.0

    @property
    def whereabouts(self) -> str:
        """Where the vision tokens are: in full on the device, in main memory, or in codes."""
        share = self.resident / self.full if self.full else 1.0
        rest = "main memory holds all of it"
        if self.home != "host":
            rest = f"the device holds the rest {self.where}"
        return f"{share:.1%} of vision K/V is in full on the device, and {rest}"

    @property
    def steps(self) -> int:
        """Decoded tokens since the prompt, including guessed tokens that were removed again."""
        return max((len(layer) for layer in self.fetched), default=0)

    @property
    def transferred(self) -> float:
        """Bytes copied from main memory to the device at a step, mean over the steps."""
        return sum(map(sum, self.fetched)) * self.token_bytes / max(self.steps, 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers and text, ready for JSON."""
        names = ("home", "budget", "full", "resident", "device", "parked", "index")
        numbers = {name: getattr(self, name) for name in names}
        return {**numbers, "share": self.share, "transferred_per_token": self.transferred}

    def __str__(self) -> str:
        index = f"{self.index:,} of index, " if self.home == "host" else ""
        return (
            f"recall: {self.resident:,} bytes of vision K/V in full, {index}"
            f"{self.parked:,} parked {self.where}: {self.share:.1%} of the full bytes on the device"
        )


@dataclass(frozen=True)
class CodesReport:
    """Bytes of the vision tokens of a prompt, summed over layers, where kept tokens are in codes.

    bits: of a number
    text: whether text is in codes too, but for the last RECENT text tokens of a prompt
    full: bytes of the keys and values of all its vision tokens, in the model's dtype
    device: bytes of those that were kept, in codes, or in full in layers that were left alone;
        fillers are not counted
    """

    bits: int
    text: bool
    full: int
    device: int

    @property
    def share(self) -> float:
        """Device bytes as a share of the bytes of the full cache; 1 without vision tokens."""
        return self.device / self.full if self.full else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, ready for JSON."""
        return {**asdict(self), "share": self.share}

    def __str__(self) -> str:
        text = f", and text but for the last {RECENT} tokens of a prompt," if self.text else ""
        share = f"{self.share:.1%} of the full vision K/V bytes"
        return f"vision tokens{text} in {self.bits}-bit codes: {share}"
