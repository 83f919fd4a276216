"""Counts the bytes of tensors that live while some code runs, without a profiler and on any device.

What an operator allocates and frees inside itself is not seen.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the storages that operators return inside a `with` block.

    now: bytes of those that live; peak: the most of them at a time
    largest: shapes of the largest tensors at the peak, for the message of a test
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.largest: list[tuple[int, tuple[int, ...]]] = []
        self._held: dict[int, tuple[int, tuple[int, ...]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(_is, tree_leaves(out)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self._held:
                self._held[key] = (storage.nbytes(), tuple(tensor.shape))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, key)
        if self.now > self.peak:
            self.peak = self.now
            self.largest = sorted(self._held.values(), reverse=True)[:8]
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._held.pop(key)[0]


def _is(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
