"""The tensors of transformers' own cache layers, and the bytes that they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def named_tensors(layer: Any) -> list[tuple[str, Tensor]]:
    """The tensors of a cache layer, with the names of the attributes that hold them.

    Tensors without dimensions, such as a length, are left out. Quantized layers hold their tensors
    together with scales: in tuples, or inside one tensor subclass.
    """
    named: list[tuple[str, Tensor]] = []
    waiting = list(vars(layer).items())[::-1]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(name, part) for part in value.values()]
        elif isinstance(value, tuple | list):
            waiting += [(name, part) for part in value]
        elif is_traceable_wrapper_subclass(value):
            waiting += [(name, getattr(value, part)) for part in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor) and value.dim() > 0:
            named.append((name, value))
    return named


def is_kv(name: str) -> bool:
    """Whether an attribute of a cache layer holds keys or values of attention.

    Other attributes hold states of linear and convolutional layers, or the keys of an indexer.
    """
    return name.endswith(("keys", "values")) and not name.startswith("indexer")


def content_bytes(layer: Any) -> int:
    """Bytes of the content of a cache layer. A view counts as its own elements only."""
    sizes = {(t.data_ptr(), t.shape, t.stride()): t.nbytes for _, t in named_tensors(layer)}
    return sum(sizes.values())


def release_views(layers: Iterable[Any]) -> None:
    """Free the keys and values of a prompt that are outside the window of sliding layers.

    transformers stores a slice of the whole prompt, which keeps all of it allocated until the next
    token. The slice is replaced by a copy.
    """
    for layer in layers:
        for name in ("keys", "values"):
            tensor = vars(layer).get(name)
            plain = isinstance(tensor, Tensor) and not is_traceable_wrapper_subclass(tensor)
            if plain and tensor.untyped_storage().nbytes() > tensor.nbytes:
                setattr(layer, name, tensor.clone(memory_format=torch.contiguous_format))
