"""Counts the bytes that tensors keep allocated."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def allocated(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of the tensors, slack and fillers included.

    A view counts with its whole storage, because the view keeps all of it allocated.
    """
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
