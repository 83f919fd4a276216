"""The options of recall, the interface of a home, and the registry of homes.

A home holds the vision tokens of one layer that a policy would have dropped. To add a kind of home,
write one file with a class that has the attributes and methods of `Home`, and add one line to
`plphp.recall`, where `HOMES` is filled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.errors import InputError
from plphp.policy import KeepPlan, Look
from plphp.policy.checks import check_choice, check_count, check_share
from plphp.recall.budget import Place
from plphp.recall.serialize import Saved


@dataclass(frozen=True)
class Recall:
    """Options of recall, which parks the vision tokens that a policy drops.

    home: where parked tokens are, a name in `plphp.recall.HOMES`.
        "host": keys and values are in main memory. A small index of the keys is on the device, and
        at every step each KV head fetches the tokens whose keys fit its query best.
        "int4", "int2": keys and values are on the device, in 4 or 2 bits a number. All of them are
        read at every step
    budget: device bytes of the vision tokens, index and codes included, as a share of those of the
        full cache in the model's dtype, over all layers, 0 to 1. The first third of the layers
        stores twice as many tokens in full as the others. With 1 nothing is parked. With 0 nothing
        is stored in full, which "host" does not allow
    rank: only for "host": components of a key in the index, 4 bits each; by default a quarter of
        the size of a head
    every: only for "host": tokens are chosen at every `every`-th step. Accuracy falls above 1
        (docs/recall-how.md)
    record: only for "host": record on the CPU which tokens each KV head reads at every step, for
        `PrunedCache.recalled()`

    Raises InputError for a value out of range, an unknown home, and an option that the home does
    not have.
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
                raise InputError(
                    f"{option.name} has no effect with home={self.home!r}, only with "
                    f"{' or '.join(f'home={name!r}' for name in takers)}"
                )
        kind.check(self)

    def least_share(self, dim: int, itemsize: int) -> float:
        """As `Home.least_share`, for the home of these options."""
        return HOMES[self.home].least_share(dim, itemsize)

    @property
    def bits(self) -> int | None:
        """Bits of a number in codes; None if parked numbers are not rounded."""
        bits: int | None = getattr(HOMES[self.home], "bits", None)
        return bits


class Home(Protocol):
    """Holds the parked vision tokens of one layer, and computes attention to them.

    where: the place of the parked tokens in the words of a report, such as "in main memory"
    exact: whether parked numbers are read as they were, without rounding
    options: the options of `Recall` that this kind of home has, besides `home` and `budget`
    plan: the plan to which the store must be compacted after `park`: the resident vision tokens,
        then all text. The caller sets it to None afterwards, since it is as large as the prompt
    full: bytes of the vision tokens in the full cache
    resident: bytes of the vision tokens that are stored in full on the device
    device: device bytes of the vision tokens; fillers and the columns that a sliding window needs
        are not counted
    token_bytes: bytes of one token's key and value in the model's dtype
    fetched: tokens fetched at each step since the prompt, over all rows and KV heads
    log: with `record`, a tensor (B, Hkv, k) int64 in main memory for each token since the prompt:
        the row-logical positions that it read, ascending, filled up with -1
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
        """Raise InputError for values of options that this kind of home does not support."""

    @classmethod
    def least_share(cls, dim: int, itemsize: int) -> float:
        """The smallest share of the full bytes that parked tokens can take on the device.

        dim: D, for keys and values; itemsize: bytes of a number in the model's dtype
        """
        ...

    @classmethod
    def park(cls, store: KVStore, look: Look, recall: Recall, place: Place) -> Self:
        """Park the vision tokens of a store that holds every column of the prompt.

        look: the scores of the policy
        place: number of the layer among those that park tokens, from 0, and their count
        """
        ...

    @classmethod
    def restored(cls, saved: Saved, recall: Recall, store: KVStore, spans: Tensor) -> Self:
        """Make a home from its saved form.

        store: keys and values of the layer, already read from the file
        spans: (B, columns) int64 of the conversation, with at least one vision token
        Raises InputError if `saved` does not fit the store, the spans or the options.
        """
        ...

    def saved(self) -> Saved:
        """The tensors and numbers that `restored` needs. `fetched` and `log` are not saved."""
        ...

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns to the store and this home.

        query: (B, H, T, D); scale, softcap: as in `plphp.attention.decode_attention`
        """
        ...

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the last queries attended to, for `plphp.hf.attention_probe`.

        Returns the keys (B, Hkv, S, D), a mask as `KVStore.visible` returns it, and (B, Hkv, S)
        bool, True for vision tokens.
        """
        ...

    def vision_slots(self, store: KVStore) -> Tensor:
        """(B, Hkv, end) bool: which slots of the store hold vision tokens."""
        ...

    def slot_columns(self, store: KVStore, row: int) -> Tensor:
        """(Hkv, k) int64: the columns of the vision tokens in the first slots of a row."""
        ...

    def tokens(self, store: KVStore) -> tuple[Tensor, Tensor]:
        """Keys (n, D) and values (n, Dv) of every vision token, on the device.

        They are in the order of rows, KV heads and columns.
        """
        ...

    def tensors(self) -> list[Tensor]:
        """The tensors on the device, besides those of the layer's store."""
        ...

    def parked(self) -> list[Tensor]:
        """The tensors of the parked keys and values, in main memory or on the device."""
        ...

    def crop(self, store: KVStore, columns: int) -> None:
        """Adapt to a store whose last `columns` columns have been removed."""

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) int64 of the batch, in any order and also repeated."""

    def move(self, device: torch.device) -> None:
        """Move the tensors that are on the device to another device."""


HOMES: dict[str, type[Home]] = {}  # name -> class; filled in `plphp.recall`


def as_recall(given: Recall | str | None) -> Recall | None:
    """The options with which recall was given: the name of a home stands for its defaults.

    Raises InputError for an unknown name.
    """
    if not isinstance(given, str):
        return given
    if given not in HOMES:
        raise InputError(f"recall must be one of {tuple(HOMES)} or a plphp.Recall, got {given!r}")
    return Recall(home=given)
