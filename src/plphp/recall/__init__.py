"""Recall: vision tokens that a policy drops are parked, and read again when they are needed."""

from __future__ import annotations

from plphp.cache import KVStore
from plphp.policy import Look
from plphp.recall.budget import Place
from plphp.recall.home import HOMES, Home, Recall, as_recall
from plphp.recall.host import HostHome
from plphp.recall.kept_codes import KeptBits, KeptCodes, keep_in_codes
from plphp.recall.quantised import Int2Home, Int4Home, QuantisedHome
from plphp.recall.serialize import Saved, from_format_1

HOMES["host"] = HostHome
HOMES["int4"] = Int4Home
HOMES["int2"] = Int2Home

__all__ = [
    "HOMES",
    "Home",
    "HostHome",
    "KeptBits",
    "KeptCodes",
    "QuantisedHome",
    "Recall",
    "Saved",
    "as_recall",
    "from_format_1",
    "keep_in_codes",
    "park",
]


def park(store: KVStore, look: Look, recall: Recall, place: Place = (0, 1)) -> Home:
    """Park the vision tokens of one layer in the kind of home that `recall` names.

    The arguments are those of `Home.park`.
    """
    return HOMES[recall.home].park(store, look, recall, place)
