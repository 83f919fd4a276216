"""Tokens of one layer that are on the device in codes, and attention to them.

Attention decodes the codes block by block, keys first and then values, so that the codes of a whole
layer are never decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from plphp.attention import coded_attention, decode_attention, side_by_side
from plphp.cache import KVStore
from plphp.recall.codes import KeyCodes, ValueCodes, key_bytes, row_bytes
from plphp.recall.serialize import Saved


class CodedTokens:
    """Codes of P tokens in each KV head of a layer, which every decoding step reads.

    keys, values: the codes; some of the P tokens of a row may be fillers
    valid: (B, P) bool, False for fillers; None if there are none
    columns: (B, Hkv, P) int32, the column of each token; only with a sliding window
    """

    def __init__(
        self, keys: KeyCodes, values: ValueCodes, valid: Tensor | None, columns: Tensor | None
    ) -> None:
        self.keys, self.values = keys, values
        self.valid = None if valid is None or bool(valid.all()) else valid
        self.columns = columns

    def attend(self, query: Tensor, store: KVStore, scale: float, softcap: float | None) -> Tensor:
        """Attention output (B, H, T, Dv) of the last T columns to the store and the codes."""
        if not self.keys.tokens:  # all tokens of a layer may be stored in full
            return decode_attention(query, store, scale, softcap)
        return coded_attention(query, store, self, scale, softcap)

    def visible(self, store: KVStore, queries: int) -> Tensor | None:
        """The mask of the last T columns over the slots and then the tokens in codes.

        Returns (B or 1, Hkv or 1, T, end + P) bool, or None if each attends to everything.
        """
        slots = store.visible(queries)
        if slots is None and self.valid is None and self.columns is None:
            return None
        length = self.keys.tokens
        device = store.start.device
        coded = torch.ones(1, 1, queries, length, dtype=torch.bool, device=device)
        if self.valid is not None:
            coded = coded & self.valid[:, None, None]
        if self.columns is not None and store.window is not None:
            coded = coded & store.in_window(self.columns, queries)
        if slots is None:
            slots = torch.ones(1, 1, queries, store.end, dtype=torch.bool, device=device)
        return side_by_side(slots, coded)

    def present(self) -> Tensor:
        """(B, P) bool, False for fillers."""
        if self.valid is not None:
            return self.valid
        rows, _, tokens = self.values.packed.shape[:3]
        return torch.ones(rows, tokens, dtype=torch.bool, device=self.values.packed.device)

    def tensors(self) -> list[Tensor]:
        """The tensors on the device, besides those of the layer's store."""
        return self.parked() + [x for x in (self.valid, self.columns) if x is not None]

    def parked(self) -> list[Tensor]:
        """The codes, on the device."""
        return [self.keys.packed, self.values.packed]

    def saved_codes(self) -> dict[str, Tensor]:
        """The codes by their names in a file, as `restored_codes` reads them."""
        return {"keys.codes": self.keys.packed, "values.codes": self.values.packed}

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) int64 of the batch, in any order and also repeated."""
        self._through(lambda x: x[rows.to(x.device)])

    def move(self, device: torch.device) -> None:
        """Move the codes to a device."""
        self._through(lambda x: x.to(device))

    def _through(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor on the device by the result of a function."""
        self.keys, self.values = self.keys.through(change), self.values.through(change)
        self.valid = None if self.valid is None else change(self.valid)
        self.columns = None if self.columns is None else change(self.columns)


def restored_codes(
    saved: Saved, store: KVStore, tokens: int, bits: int
) -> tuple[KeyCodes, ValueCodes]:
    """The codes of P = `tokens` tokens from their saved form. Raises ValueError for other shapes.

    store: of the same layer
    """
    lead, dim, value_dim = store.keys.shape[:2], store.keys.shape[-1], store.values.shape[-1]
    rows = (*lead, tokens, row_bytes(value_dim, bits))
    values = saved.tensor("values.codes", rows, torch.uint8)
    keys = saved.tensor("keys.codes", (*lead, key_bytes(tokens, dim, bits)), torch.uint8)
    return KeyCodes(keys, bits, tokens, dim), ValueCodes(values, bits, value_dim)
