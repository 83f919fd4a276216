"""The options of recall, what a home is, and the registry of homes.

A home holds the vision tokens of one layer that a policy would have dropped. A new kind of home is
one file with a class that has what `Home` names, and one line in `plphp.recall.HOMES`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.policy import KeepPlan, Look
from plphp.policy.base import check_choice, check_count, check_share
from plphp.recall.budget import Place
from plphp.recall.serialize import Saved


@dataclass(frozen=True)
class Recall:
    """Park what a policy drops instead of destroying it.

    home: the kind of home that holds the parked tokens, a name in `plphp.recall.HOMES`.
        "host": keys and values lie in main memory; a small index of the keys stays on the device,
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

    home: str = "host"
    budget: float = 0.4
    rank: int | None = None
    every: int = 1
    record: bool = False

    def __post_init__(self) -> None:
        check_choice("home", self.home, tuple(HOMES))
        check_share("budget", self.budget)
        if self.rank is not None:
            check_count("rank", self.rank, 1)
        check_count("every", self.every, 1)
        kind = HOMES[self.home]
        for option in fields(self)[2:]:
            if option.name not in kind.options and getattr(self, option.name) != option.default:
                takers = [name for name, other in HOMES.items() if option.name in other.options]
                raise ValueError(
                    f"{option.name} has no effect with home={self.home!r}, only with "
                    f"{' or '.join(f'home={name!r}' for name in takers)}"
                )
        kind.check(self)

    def least_share(self, dim: int, itemsize: int) -> float:
        """The share of the full bytes that nothing fits below, as `Home.least_share` says."""
        return HOMES[self.home].least_share(dim, itemsize)

    @property
    def bits(self) -> int | None:
        """Bits of a parked number on the device, None where numbers are parked as they are."""
        bits: int | None = getattr(HOMES[self.home], "bits", None)
        return bits


class Home(Protocol):
    """The vision tokens of one layer, parked, and what the layer needs of them.

    where: the place of the parked tokens as a reader is told it, such as "in main memory"
    exact: whether parked numbers come back as they were, not rounded
    options: the options of `Recall` that the kind takes besides `home` and `budget`
    plan: what the store should be compacted to after `park`: the vision tokens held in full, then
        all text. It is as long as the prompt, so the caller takes it off
    full, resident, device: bytes of the vision tokens in the full cache, of those held in full, and
        of all that lies on the device for them; fillers of unequal rows and what a sliding window
        needs are not counted
    token_bytes: bytes of one token's key and value in the model's dtype
    fetched: tokens fetched at each step since the prompt, all rows and KV heads together
    log: (B, Hkv, k) int64 in main memory for each token since the prompt, the row-logical positions
        that it read, ascending, -1 pads; empty unless recorded
    """

    where: ClassVar[str]
    exact: ClassVar[bool]
    options: ClassVar[frozenset[str]]
    plan: KeepPlan | None
    full: int
    resident: int
    device: int
    fetched: list[int]
    log: list[Tensor]

    @property
    def token_bytes(self) -> int: ...

    @classmethod
    def check(cls, recall: Recall) -> None:
        """Raise ValueError for options that this kind cannot serve."""

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """What parked tokens take on the device at least, over full keys and values.

        dim: numbers of a key and of a value in one head, of `itemsize` bytes each
        """
        ...

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park the vision tokens of a store that holds every column of the prompt.

        look: how the policy ranks them; place: the layer's number among those that park, from 0,
            and how many there are
        """
        ...

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """The home that `saved` described, of a layer that holds `store`.

        spans: (B, columns) int64 of the conversation, with at least one vision token
        Raises ValueError for what does not fit the store, the spans or the options.
        """
        ...

    def saved(self) -> Saved:
        """The tensors and numbers that `restored` needs. The history of the steps is left out."""
        ...

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns over the store and this home."""
        ...

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the last queries read: keys (B, Hkv, S, D), who sees them, and which are vision's.

        The second is as `KVStore.visible`, the third (B, Hkv, S) bool.
        """
        ...

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which slots of the store hold vision tokens."""
        ...

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in a row's first slots."""
        ...

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys and values (tokens of all rows and heads, D) of every vision token, in order."""
        ...

    def tensors(self) -> list[Tensor]:
        """What lies on the device besides the layer's own buffers."""
        ...

    def parked(self) -> list[Tensor]:
        """Keys and values as they are parked, wherever that is."""
        ...

    def crop(self, store: KVStore, columns: int) -> None:
        """Follow a store that has forgotten its last columns."""

    def reorder(self, rows: Tensor) -> None:
        """Take rows (B',) of the batch, in a new order or repeated."""

    def move(self, device: torch.device) -> None:
        """Move what lies on the device to another one."""


HOMES: dict[str, type[Home]] = {}  # filled in `plphp.recall`


def as_recall(given: Recall | str | None) -> Recall | None:
    """The options behind a home's name. Raises ValueError."""
    return Recall(home=given) if isinstance(given, str) else given
