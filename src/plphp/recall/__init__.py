"""RECALL: what a policy drops is parked, and read again when a later token looks for it."""

from __future__ import annotations

from plphp.cache import KVStore
from plphp.policy import Look
from plphp.recall.budget import Place
from plphp.recall.host import HostHome
from plphp.recall.options import HOMES, Recall, as_recall
from plphp.recall.quantised import QuantisedHome
from plphp.recall.state import restored, state

Home = HostHome | QuantisedHome

__all__ = ["HOMES", "Home", "Recall", "as_recall", "park", "restored", "state"]


def park(store: KVStore, look: Look, recall: Recall, place: Place = (0, 1)) -> Home:
    """The home of one layer's vision tokens, whose `plan` says what the store may keep.

    place: the layer's number among those that park, from 0, and how many there are
    """
    kind = HostHome if recall.home == "host" else QuantisedHome
    return kind(store, look, recall, place)
