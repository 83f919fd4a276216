"""What transformers' own cache layers hold, by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def named_tensors(layer: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a cache layer under the names of the attributes that hold them.

    Scalars that a layer calculates with, such as its window, are no content and left out. What a
    quantized layer holds comes in pairs with its scales, some of them wrapped as one tensor.
    """
    found: list[tuple[str, Tensor]] = []
    left = list(vars(layer).items())[::-1]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(name, part) for part in value.values()]
        elif isinstance(value, tuple | list):
            left += [(name, part) for part in value]
        elif is_traceable_wrapper_subclass(value):
            left += [(name, getattr(value, part)) for part in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor) and value.dim() > 0:
            found.append((name, value))
    return found


def is_kv(name: str) -> bool:
    """Whether an attribute of a cache layer holds keys or values of attention.

    Others are states of linear and convolutional layers, and what an indexer looks up.
    """
    return name.endswith(("keys", "values")) and not name.startswith("indexer")


def content_bytes(layer: Any) -> int:
    """Bytes of what a cache layer holds; of a storage that it sees a part of, that part."""
    seen = {(t.data_ptr(), t.shape, t.stride()): t.nbytes for _, t in named_tensors(layer)}
    return sum(seen.values())


def release_views(layers: Iterable[Any]) -> None:
    """Free what cache layers see a part of: the keys and values of a prompt beyond their window.

    transformers slices the whole prompt's and holds all of it until the next token.
    """
    for layer in layers:
        for name in ("keys", "values"):
            held = vars(layer).get(name)
            plain = isinstance(held, Tensor) and not is_traceable_wrapper_subclass(held)
            if plain and held.untyped_storage().nbytes() > held.nbytes:
                setattr(layer, name, held.clone(memory_format=torch.contiguous_format))
