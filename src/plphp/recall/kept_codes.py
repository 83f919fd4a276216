"""Kept codes: what a policy keeps, in codes of 4 or 2 bits instead of in full (`kv_bits`).

The codes are those of the homes "int4" and "int2" (KIVI, Liu et al. 2024, arXiv 2402.02750). The
tokens that one prompt adds to a KV head are rounded in groups of their own, which stay as they are
for the rest of the conversation. A later prompt attends to the decoded numbers, which are forgotten
after it, so that nothing is rounded twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from plphp.cache import KVStore, take
from plphp.errors import InputError
from plphp.policy import KeepPlan
from plphp.recall.coded_tokens import CodedTokens, restored_codes
from plphp.recall.codes import (
    KeyCodes,
    ValueCodes,
    code_bytes,
    code_share,
    keys_to_codes,
    values_to_codes,
)
from plphp.recall.serialize import Saved
from plphp.report import RECENT


@dataclass(frozen=True)
class KeptBits:
    """Options of kept codes.

    bits: of a number, 4 or 2
    text: whether text is in codes too, but for the last RECENT text tokens of a prompt and the
        tokens of the answer, which become codes at the end of the next prompt

    Raises InputError for another number of bits.
    """

    bits: int
    text: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 2):
            raise InputError(f"kv_bits must be 4 or 2, got {self.bits!r}: leave it out for none")

    def share(self, dim: int, itemsize: int) -> float:
        """Bytes of a kept token in codes as a share of its bytes in full, for long prompts.

        dim: D, of keys and values; itemsize: bytes of a number in the model's dtype
        """
        return code_share(dim, self.bits, itemsize)

    def device_bytes(self, kept: Tensor, dims: tuple[int, int]) -> int:
        """Bytes of the codes of kept tokens (B, Hkv) int64. dims: D and Dv."""
        return int(code_bytes(kept, dims, self.bits).sum())

    def __str__(self) -> str:
        return f"kv_bits={self.bits}" + (", kv_text=True" if self.text else "")


class KeptCodes(CodedTokens):
    """The kept tokens of one layer that are in codes, from all prompts of the conversation.

    vision: (B, Hkv, P) bool, which of them are vision tokens; None if all are
    """

    def __init__(
        self,
        keys: KeyCodes,
        values: ValueCodes,
        valid: Tensor | None,
        columns: Tensor | None,
        vision: Tensor | None = None,
    ) -> None:
        super().__init__(keys, values, valid, columns)
        self.vision = vision

    @classmethod
    def of(
        cls, store: KVStore, slots: Tensor, valid: Tensor, vision: Tensor | None, bits: int
    ) -> Self:
        """Round tokens of a store.

        slots: (B, Hkv, P) int64; valid: (B, P) bool, False for fillers; vision: as in the class
        """
        columns = None
        if store.columns is not None:
            columns = take(store.columns[..., None], slots)[..., 0]
        keys = keys_to_codes(store.keys, bits, slots)
        values = values_to_codes(store.values, bits, slots)
        return cls(keys, values, valid, columns, vision)

    def followed_by(self, more: KeptCodes) -> KeptCodes:
        """These tokens and then those of a later prompt, in groups of their own."""
        fillers = self.keys.fillers
        pad = torch.nn.functional.pad
        valid = torch.cat([pad(self.present(), (0, fillers)), more.present()], -1)
        columns = vision = None
        if self.columns is not None and more.columns is not None:
            columns = torch.cat([pad(self.columns, (0, fillers)), more.columns], -1)
        if self.vision is not None and more.vision is not None:
            vision = torch.cat([pad(self.vision, (0, fillers)), more.vision], -1)
        return KeptCodes(
            self.keys.followed_by(more.keys),
            self.values.followed_by(more.values, fillers),
            valid,
            columns,
            vision,
        )

    def decoded_before(self, store: KVStore, to_come: int) -> KVStore:
        """A store with the decoded tokens before those of `store`, for the prompt of a turn.

        to_come: slots to keep free for the prompt
        """
        there = self.present()
        count = there.sum(-1)
        most = int(count.max())
        begin = most + store.start - count  # first slot of each row
        end = most + store.end
        last = end + to_come  # one slot more than is needed: fillers are written to it
        slots = (begin[:, None] + there.cumsum(-1) - 1).masked_fill(~there, last)
        rows = torch.arange(len(slots), device=slots.device)[:, None]

        def joined(blocks: Iterable[Tensor], held: Tensor) -> Tensor:
            every = held.new_zeros(*held.shape[:2], last + 1, held.shape[3])
            every[:, :, most:end] = held
            by_slot, at = every.transpose(1, 2), 0
            for block in blocks:
                some = slots[:, at : (at := at + block.shape[2])]
                by_slot[rows, some] = block.transpose(1, 2).to(held.dtype)
            return every

        keys, values = store.held()
        keys = joined(self.keys.decoded(), keys)
        new = KVStore(keys, joined(self.values.decoded(), values))
        new.window, new.logical, new.start, new.end = store.window, store.logical, begin, end
        new.ragged = bool((begin > 0).any())
        if store.columns is not None and self.columns is not None:
            held = store.columns[..., : store.end, None]
            new.columns = joined([self.columns[..., None]], held)[..., 0]
        return new

    def looked_at(self, store: KVStore, queries: int) -> tuple[Tensor, Tensor | None, Tensor]:
        """The keys, mask and vision tokens of the last queries; see `Home.looked_at`."""
        keys, coded = store.held()[0], self.keys.dense(store.keys.dtype)
        vision = self.present()[:, None].expand(coded.shape[:3])
        if self.vision is not None:
            vision = vision & self.vision
        none = vision.new_zeros(*keys.shape[:3])
        keys = torch.cat([keys, coded], 2)
        return keys, self.visible(store, queries), torch.cat([none, vision], 2)

    def tensors(self) -> list[Tensor]:
        """The tensors on the device, besides those of the layer's store."""
        return super().tensors() + ([] if self.vision is None else [self.vision])

    def reorder(self, rows: Tensor) -> None:
        """Select rows (B',) int64 of the batch, in any order and also repeated."""
        super().reorder(rows)
        self.vision = None if self.vision is None else self.vision[rows.to(self.vision.device)]

    def move(self, device: torch.device) -> None:
        """Move the codes to a device."""
        super().move(device)
        self.vision = None if self.vision is None else self.vision.to(device)

    def saved(self) -> Saved:
        """The tensors that `restored` needs."""
        more = {"valid": self.present(), "columns": self.columns, "vision": self.vision}
        return Saved(self.saved_codes() | {name: x for name, x in more.items() if x is not None})

    @classmethod
    def restored(cls, saved: Saved, kept: KeptBits, store: KVStore) -> Self:
        """Make the codes from their saved form. Raises ValueError if it does not fit the store."""
        names = ["keys.codes", "values.codes", "valid"]
        names += ["columns"] if store.window is not None else []
        names += ["vision"] if kept.text else []
        saved.only(tuple(names))
        lead = store.keys.shape[:2]
        given = saved.tensors["values.codes"]
        tokens = given.shape[2] if given.dim() == 4 else 0
        keys, values = restored_codes(saved, store, tokens, kept.bits)
        valid = saved.tensor("valid", (lead[0], tokens), torch.bool)
        columns = vision = None
        if store.window is not None:
            columns = saved.tensor("columns", (*lead, tokens), torch.int32)
            if bool(((columns < 0) | (columns >= store.logical)).any()):
                raise ValueError("the kept codes are inconsistent: a column is out of range")
        if kept.text:
            vision = saved.tensor("vision", (*lead, tokens), torch.bool)
        slots = int((store.end - store.start + valid.sum(-1)).max())
        if not tokens or slots > store.logical:
            raise ValueError("the kept codes are inconsistent: more tokens than columns")
        return cls(keys, values, valid, columns, vision)


def keep_in_codes(
    store: KVStore, plan: KeepPlan, spans: Tensor, before: KeptCodes | None, kept: KeptBits
) -> tuple[KeepPlan, KeptCodes | None]:
    """Round what a plan keeps. Returns the plan of what stays in the store, and all codes.

    store: as the policy has seen it, with the decoded tokens of earlier prompts in the first slots
        of each row
    spans: (B, slots) int64 of its slots; earlier turns count as text
    before: the codes of earlier prompts; the plan keeps all of them
    """
    slots = plan.columns
    heads = slots.shape[1]
    vision = (spans.to(slots.device) > 0)[:, None].expand(-1, heads, -1).gather(2, slots)
    there = plan.valid[:, None].expand_as(vision)
    earlier = torch.zeros_like(there)
    if before is not None:
        end = store.start + before.present().sum(-1)
        earlier = there & (slots < end[:, None, None])
    text = there & ~vision & ~earlier
    coded = there & vision
    if kept.text:
        later = text.flip(-1).cumsum(-1).flip(-1)  # text tokens from each slot on
        coded = coded | (text & (later > RECENT))
    stays = there & ~coded & ~earlier
    lengths = stays[:, 0].sum(-1)
    longest = int(lengths.max())
    last = stays.int().argsort(dim=-1, stable=True)[..., slots.shape[2] - longest :]
    rest = replace(
        plan,
        columns=slots.gather(2, last),
        lengths=lengths,
        ragged=bool((lengths != longest).any()),
    )
    count = coded[:, 0].sum(-1)
    most = int(count.max())
    if not most:
        return rest, before
    entries = torch.arange(most, device=slots.device)
    first = coded.int().argsort(dim=-1, descending=True, stable=True)
    entry = torch.minimum(entries, (count - 1).clamp(min=0)[:, None])
    chosen = first.gather(2, entry[:, None].expand(-1, heads, -1))
    is_vision = vision.gather(2, chosen) if kept.text else None
    valid = entries < count[:, None]
    new = KeptCodes.of(store, slots.gather(2, chosen), valid, is_vision, kept.bits)
    return rest, new if before is None else before.followed_by(new)
