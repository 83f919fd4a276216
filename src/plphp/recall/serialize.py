"""Parked tokens in a file: named tensors and numbers, checked when they are read.

Names do not follow from attributes: a home says in `saved` what each of them holds. Whatever
follows from the conversation's spans, from the options or from what the store holds is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.recall.slot_order import Vision

# Format 1 wrote the attributes of a home. These follow from the spans:
DERIVED = frozenset(("origin", "valid", "columns", "places", "count"))
RENAMED = {"keys.packed": "keys.codes", "values.packed": "values.codes"}


@dataclass(frozen=True)
class Saved:
    """One layer's parked tokens as a file holds them.

    tensors, numbers: by name, without what tells layers apart
    Every method raises ValueError for what no home can have written.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int] = field(default_factory=dict)

    def only(self, tensors: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
        """Check that these are all names that there are."""
        for wanted, found in ((tensors, self.tensors), (numbers, self.numbers)):
            if missing := sorted(set(wanted) - set(found)):
                raise ValueError(f"what is parked is incomplete: {missing[0]} is missing")
            if more := sorted(set(found) - set(wanted)):
                raise ValueError(f"what is parked does not fit its home: {more[0][:60]!r}")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of this shape and dtype."""
        found = self.tensors[name]
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(
                f"what is parked does not fit what is held: {name} is {tuple(found.shape)} "
                f"{found.dtype}, not {shape} {dtype}"
            )
        return found

    def number(self, name: str, least: int, most: int) -> int:
        """A whole number in a range."""
        found = self.numbers[name]
        if type(found) is not int or not least <= found <= most:
            raise ValueError(f"what is parked makes no sense: {name} must be {least} to {most}")
        return found

    def held(self, dtype: torch.dtype, store: KVStore, vision: Vision, ascending: bool) -> Tensor:
        """(B, Hkv, k): which vision token of its row each of the first k slots holds, V for none.

        ascending: whether every head's are in order
        """
        lead, most = store.keys.shape[:2], vision.most
        found = self.tensors["held"]
        count = found.shape[-1] if found.dim() == 3 else -1
        found = self.tensor("held", (*lead, count), dtype)
        numbers = found.long()
        if bool(((numbers < 0) | (numbers > most)).any()):
            raise ValueError("what is at hand makes no sense: its tokens are not numbered")
        real = numbers < most
        slots = torch.arange(count)
        used = real.sum(-1)
        order = numbers if ascending else numbers.sort(-1).values
        twice = (order[..., 1:] <= order[..., :-1]) & (order[..., 1:] < most)
        wrong = bool((real != (slots < used[..., None])).any()) or bool((used != used[:, :1]).any())
        beyond = real & (numbers >= vision.tokens[:, None, None])
        if wrong or bool(twice.any()) or bool(beyond.any()):
            raise ValueError("what is at hand makes no sense: a token is twice in it, or not there")
        text = store.end - store.start - used[:, 0]
        if not torch.equal(text, vision.text(store.logical)):
            raise ValueError("what is held does not fit what is at hand: a text token is missing")
        return found


def from_format_1(tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> Saved:
    """What format 1 wrote of a home, in the names of today."""
    return Saved(
        {RENAMED.get(name, name): x for name, x in tensors.items() if name not in DERIVED},
        {name: x for name, x in numbers.items() if name == "begin"},
    )
