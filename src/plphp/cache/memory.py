"""Byte accounting: what is allocated, counted by storage, and what full caches would take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors, slack and fillers included."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
