"""`PrunedLayer`, one decoder layer of a pruned cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from plphp.cache import KVStore, StaticStore
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.located import spans_until
from plphp.hf.shared import Shared
from plphp.policy import KeepPlan
from plphp.policy.view import PADDING, keep_in_every_head
from plphp.recall import Home, KeptCodes, keep_in_codes


class PrunedLayer(CacheLayerMixin):
    """One decoder layer of the cache: transformers' interface to the store of the layer.

    Methods without a docstring are described by transformers' `CacheLayerMixin`. transformers is
    given logical lengths, as if nothing had been dropped.

    store: keys and values that the layer holds, None before the first token
    raw: whether the store holds every column, so that the model's own masks fit it
    parked: the home of the vision tokens that are parked, None without recall
    codes: the kept tokens that are in codes, None without them
    decoded: whether the store holds these tokens too, decoded, while a prompt is read
    spare: static buffers that `reset` left, to be filled again by the next conversation
    compute_device: where the layer was before `offload`, None if it was never moved
    recent: (B, H, T, D) last queries of the chunks read so far, None if no chunk is waiting
    entered: (B, columns) bool, with recall: columns that entered the layer; None for all
    """

    is_croppable = True

    def __init__(self, window: int | None, shared: Shared) -> None:
        super().__init__()
        self.window = window
        self.shared = shared
        self.is_sliding = window is not None
        self.store: KVStore | StaticStore | None = None
        self.raw = True
        self.parked: Home | None = None
        self.codes: KeptCodes | None = None
        self.decoded = False
        self.spare: StaticStore | None = None
        self.is_compileable = shared.static
        self.compute_device: torch.device | None = None
        self.recent: Tensor | None = None
        self.entered: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """(B, Hkv, slots, D) of the slots in use, for transformers; None in a static cache."""
        return self.store.held()[0] if isinstance(self.store, KVStore) else None

    @keys.setter
    def keys(self, value: None) -> None: ...  # set to None by the mixin

    @property
    def values(self) -> Tensor | None:
        """(B, Hkv, slots, Dv), as `keys`."""
        return self.store.held()[1] if isinstance(self.store, KVStore) else None

    @values.setter
    def values(self, value: None) -> None: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, Hkv, T, D); return those of all slots in use."""
        if self.store is None:
            self.is_initialized = True
            self.store = KVStore(key_states, value_states, self.window)
            self._name_columns(self.store)
            return key_states, value_states
        prefill = self.shared.prefill
        begins = prefill is not None and self.store.logical <= prefill.prompt.begin
        if self.shared.recall is not None and begins and not self.raw:
            restore(self)
        if self.codes is not None and self.shared.prefill is not None and not self.decoded:
            assert isinstance(self.store, KVStore)
            to_come = self.shared.prefill.prompt.end - self.store.logical
            self.store, self.decoded = self.codes.decoded_before(self.store, to_come), True
        self.store.append(key_states, value_states)
        self._name_columns(self.store)
        return self.store.held()

    def _name_columns(self, store: KVStore | StaticStore) -> None:
        """Say which columns a forward has appended, where a sequence method left out others."""
        prefill = self.shared.prefill
        part = None if prefill is None else prefill.part
        if prefill is not None and part is not None and isinstance(store, KVStore):
            begin = prefill.prompt.begin + prefill.forward[0]
            store.name_columns(part.columns + begin, begin + part.count)

    def compact(
        self, plan: KeepPlan, spans: Tensor, drafts: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """Keep the columns of a plan, in new buffers.

        spans: (B, slots) int64 of the slots of the store
        drafts: keys and values (B, Hkv, T, D) of guessed tokens after the prompt; all are kept
        """
        assert isinstance(self.store, KVStore)
        if self.shared.kept is not None:
            kept, before = self.shared.kept, self.codes if self.decoded else None
            plan, self.codes = keep_in_codes(self.store, plan, spans, before, kept)
            self.decoded = False
        longest = plan.columns.shape[-1]
        self.store.compact(plan, self.shared.reserve(longest, self.store.logical))
        if drafts is not None:
            self.store.append(*drafts)
        self.raw = False
        if self.shared.static:
            self._freeze(self.store)

    def _freeze(self, store: KVStore) -> None:
        """Make the store static for decoding, with its lengths on the device.

        The buffers of an earlier prompt are filled again if the new one fits into them. Then a
        CUDA graph that was captured with them is replayed, and nothing is allocated.
        """
        if self.spare is not None and self.spare.refill(store):
            self.store = self.spare
        else:
            self.store = StaticStore(store)
        self.spare = None

    def thaw(self) -> None:
        """Bring lengths back to the host: what follows is a prompt."""
        if isinstance(self.store, StaticStore):
            self.store = self.store.thaw()

    def get_seq_length(self) -> Any:
        """Columns seen so far, dropped ones included; a tensor while the layer is frozen."""
        return 0 if self.store is None else self.store.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if isinstance(self.store, StaticStore) and self.shared.max_len is not None:
            return self.shared.max_len, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        max_len = self.shared.max_len
        return max_len if self.shared.static and max_len is not None else -1

    def reset(self) -> None:
        self.spare = self.store if isinstance(self.store, StaticStore) else None
        self.store, self.raw, self.is_initialized, self.recent = None, True, False, None
        self.parked = self.codes = self.entered = None
        self.decoded = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.store is not None:
            self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            rows = torch.arange(len(self.store.keys), device=self.store.keys.device)
            self._rows(rows.repeat_interleave(repeats))

    def _rows(self, rows: Tensor) -> None:
        """Put the rows (B',) of stored and parked tokens in a new order, or repeat them."""
        assert self.store is not None
        self.store.reorder(rows)
        if self.entered is not None:
            self.entered = self.entered[rows.to(self.entered.device)]
        for part in (self.parked, self.codes):
            if part is not None:
                part.reorder(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns, which must be text after the last image.

        Raises UnsupportedModeError if that reaches into an image, whose tokens may be dropped.
        """
        columns = abs(tokens_to_remove)
        if self.store is None:
            return
        if int(self.store.logical) - columns < self.shared.last_image:
            raise UnsupportedModeError(
                f"cannot crop {columns} tokens: that reaches into pruned images, or into text in "
                "codes; start a new cache"
            )
        self.store.crop(columns)
        if self.parked is not None:
            assert isinstance(self.store, KVStore)
            self.parked.crop(self.store, columns)

    def offload(self) -> None:
        self.move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.compute_device is not None:
            self.move(self.compute_device)

    def move(self, device: torch.device) -> None:
        """Move stored and parked tokens to a device. `prefetch` moves them back.

        Raises UnsupportedModeError for a static cache.
        """
        if isinstance(self.store, StaticStore):
            raise UnsupportedModeError("a static cache stays on its device")
        if self.store is not None:
            self.compute_device = self.compute_device or self.store.keys.device
            self.store.to(device)
        for part in (self.parked, self.codes):
            if part is not None:
                part.move(device)


def restore(layer: PrunedLayer) -> None:
    """Store every column of a layer again, for a prompt that attends to the whole conversation.

    With recall nothing is lost: text is in the store, and vision tokens come from their home.
    """
    store, home, spans = layer.store, layer.parked, layer.shared.spans
    assert isinstance(store, KVStore) and spans is not None
    spans = spans_until(spans.to(store.start.device), store.logical)
    if layer.entered is not None:  # what never entered is missing, as padding is
        entered = layer.entered[:, : store.logical].to(spans.device)
        spans[:, : entered.shape[1]].masked_fill_(~entered, PADDING)
    heads = (-1, store.keys.shape[1], -1)
    text, vision = ((where[:, None]).expand(heads) for where in (spans == 0, spans > 0))
    used = torch.arange(store.end, device=spans.device) >= store.start[:, None, None]
    used = used.expand(heads)
    parked = None if home is None else home.tokens(store)
    if home is not None:
        used = used & ~home.vision_slots(store)
    whole = []
    for number, stored in enumerate(store.held()):  # the keys, then the values
        full = stored.new_zeros(*stored.shape[:2], store.logical, stored.shape[-1])
        full[text] = stored[used]
        if parked is not None:
            full[vision] = parked[number]
        whole.append(full)
    layer.store = KVStore(whole[0], whole[1], layer.window)
    layer.raw, layer.parked = True, None
    if layer.entered is not None:
        layer.store.compact(keep_in_every_head(spans >= 0, store.keys.shape[1]))
        layer.raw = False


def layer_tensors(layer: Any) -> Iterator[Tensor]:
    """Every tensor that a cache layer keeps allocated, plphp's or one of transformers'."""
    if not isinstance(layer, PrunedLayer):
        yield from compat.held_tensors(layer)
        return
    for store in (layer.store, layer.spare, layer.parked, layer.codes):
        if store is not None:
            yield from store.tensors()
