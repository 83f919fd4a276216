"""A home as flat tensors and numbers, for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

from plphp.cache import KVStore
from plphp.recall.codes import KeyCodes, ValueCodes
from plphp.recall.host import HostHome
from plphp.recall.index import KeyIndex
from plphp.recall.options import Recall
from plphp.recall.quantised import QuantisedHome

PARTS: dict[type, dict[str, type]] = {
    HostHome: {"index": KeyIndex},
    QuantisedHome: {"keys": KeyCodes, "values": ValueCodes},
}


def state(home: HostHome | QuantisedHome) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and numbers, by dotted names. What has been fetched and logged is left behind."""
    every = _flat(home)
    tensors = {name: x.contiguous() for name, x in every.items() if isinstance(x, Tensor)}
    return tensors, {name: x for name, x in every.items() if name not in tensors}


def restored(
    recall: Recall, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], store: KVStore
) -> HostHome | QuantisedHome:
    """The home that `state` described, of a layer that holds `store`. Raises ValueError."""
    home: Any = object.__new__(HostHome if recall.bits is None else QuantisedHome)
    every = {**numbers, **tensors}
    try:
        for name, part in PARTS[type(home)].items():
            inner = {k: every.pop(k) for k in list(every) if k.startswith(f"{name}.")}
            every[name] = part(**{k.partition(".")[2]: x for k, x in inner.items()})
        vars(home).update(every, fetched=[], log=[], chosen=[])
        rows, heads = store.keys.shape[:2]
        fits = all(
            len(x) == rows and (x.dim() < 3 or x.shape[1] == heads) for x in tensors.values()
        )
        if not fits or home.held.shape[2] > store.end:
            raise ValueError("what is parked does not fit what is held")
        numbered = (home.held >= 0) & (home.held <= home.tokens_a_row)
        if home.held.is_floating_point() or not bool(numbered.all()):
            raise ValueError("what is at hand makes no sense")
    except (AttributeError, KeyError, TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"what is parked is incomplete: {error}") from error
    found: HostHome | QuantisedHome = home
    return found


def _flat(thing: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(thing).items():
        if is_dataclass(value):
            found |= {f"{name}.{inner}": x for inner, x in _flat(value).items()}
        elif not isinstance(value, list):
            found[name] = value
    return found
