"""The saved form of parked tokens: named tensors and numbers, checked when they are read.

The names in a file do not depend on the names of attributes. What can be computed from the spans of
the conversation, from the options or from the store is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.recall.slot_order import Vision

# Format 1 wrote all attributes of a home. These can be computed from the spans:
DERIVED = frozenset(("origin", "valid", "columns", "places", "count"))
RENAMED = {"keys.packed": "keys.codes", "values.packed": "values.codes"}


@dataclass(frozen=True)
class Saved:
    """The parked tokens of one layer, as they are in a file.

    tensors, numbers: by name; the names do not contain the layer
    Every method raises ValueError for content that no home can have written.
    """

    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int] = field(default_factory=dict)

    def only(self, tensors: tuple[str, ...], numbers: tuple[str, ...] = ()) -> None:
        """Check that the file has these names and no others."""
        for expected, names in ((tensors, self.tensors), (numbers, self.numbers)):
            if missing := sorted(set(expected) - set(names)):
                raise ValueError(f"the parked tokens are incomplete: {missing[0]} is missing")
            if unknown := sorted(set(names) - set(expected)):
                raise ValueError(f"the parked tokens do not fit their home: {unknown[0][:60]!r}")

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The tensor of a name, which must have this shape and dtype."""
        tensor = self.tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(
                f"the parked tokens do not fit the layer: {name} is {tuple(tensor.shape)} "
                f"{tensor.dtype}, not {shape} {dtype}"
            )
        return tensor

    def number(self, name: str, lowest: int, highest: int) -> int:
        """The number of a name, which must be an integer in this range."""
        number = self.numbers[name]
        if type(number) is not int or not lowest <= number <= highest:
            raise ValueError(
                f"the parked tokens are inconsistent: {name} must be {lowest} to {highest}"
            )
        return number

    def held(self, dtype: torch.dtype, store: KVStore, vision: Vision, ascending: bool) -> Tensor:
        """(B, Hkv, k): the number of the vision token in each of the first k slots, V for none.

        ascending: whether the numbers must ascend in every KV head
        """
        lead, most = store.keys.shape[:2], vision.most
        held = self.tensors["held"]
        count = held.shape[-1] if held.dim() == 3 else -1
        held = self.tensor("held", (*lead, count), dtype)
        numbers = held.long()
        if bool(((numbers < 0) | (numbers > most)).any()):
            raise ValueError("the resident tokens are inconsistent: a number is out of range")
        is_token = numbers < most
        slots = torch.arange(count)
        used = is_token.sum(-1)
        order = numbers if ascending else numbers.sort(-1).values
        twice = (order[..., 1:] <= order[..., :-1]) & (order[..., 1:] < most)
        wrong = bool((is_token != (slots < used[..., None])).any()) or bool(
            (used != used[:, :1]).any()
        )
        beyond = is_token & (numbers >= vision.tokens[:, None, None])
        if wrong or bool(twice.any()) or bool(beyond.any()):
            raise ValueError(
                "the resident tokens are inconsistent: one is there twice, or does not exist"
            )
        text = store.end - store.start - used[:, 0]
        if not torch.equal(text, vision.text(store.logical)):
            raise ValueError("the resident tokens do not fit the layer: a text token is missing")
        return held


def from_format_1(tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> Saved:
    """The parked tokens of a file of format 1, with the names of the present format."""
    return Saved(
        {RENAMED.get(name, name): x for name, x in tensors.items() if name not in DERIVED},
        {name: x for name, x in numbers.items() if name == "begin"},
    )
