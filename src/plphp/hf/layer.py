"""`PrunedLayer`, one decoder layer of a pruned cache, and the state that its layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from plphp.cache import KVStore, StaticStore, bucketed
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.located import spans_until
from plphp.hf.prompt import Prefill
from plphp.policy import KeepPlan, Policy, SequencePolicy, cache_stage, policy, sequence_stage
from plphp.policy.view import PADDING, keep_in_every_head
from plphp.recall import Home, Recall


@dataclass
class Shared:
    """State that all layers of one conversation share.

    It holds no reference to a layer or cache. A reference cycle would keep the keys and values of
    finished generations allocated until Python's garbage collector runs.

    config: of the language model
    max_len, static: as given to `PrunedCache`
    policy: of the pruning that reads or has read the prompt
    attached: indices of the layers that pruning is attached to
    over_ranks: mean over tensor-parallel ranks, None without them
    depth: number of decoder layers in the cache
    prunable: indices of the layers that are pruned
    prefill: state of the prompt that is being read, None between prompts
    last_image: the column after the last vision token of the conversation, 0 without any
    watch: a function called after a layer's attention, see `attention_probe`, or None
    recall: where and how dropped tokens are parked, None if they are lost
    spans: (B, columns) int64 of all prompts read so far, with recall only, else None
    """

    config: Any
    max_len: int | None
    static: bool
    policy: Policy
    attached: frozenset[int]
    over_ranks: Any
    depth: int = 0
    prunable: tuple[int, ...] = ()
    prefill: Prefill | None = None
    last_image: int = 0
    watch: Callable[..., None] | None = None
    recall: Recall | None = None
    spans: Tensor | None = None

    def stages(self, layer: int) -> tuple[SequencePolicy | None, Policy | None]:
        """The policies that look at the attention of a layer: a sequence and a cache method.

        A static cache needs a compaction of every layer, so that its cache method is `full` where
        the policy has none.
        """
        first, second = sequence_stage(self.policy), cache_stage(self.policy)
        if first is not None and not first.scores_layer(layer, self.depth):
            first = None
        if second is None and self.static:
            second = policy("full")
        if layer not in self.prunable or (second and not second.scores_layer(layer, self.depth)):
            second = None
        return first, second

    def reserve(self, longest: int, logical: int) -> int | None:
        """Slots to keep free after a compaction, for the columns up to `max_len`.

        longest: slots in use; logical: columns seen. None without `max_len`: the store decides.
        """
        if self.max_len is None:
            return None
        to_come = max(self.max_len - logical, 1)
        return bucketed(longest + to_come) - longest if self.static else to_come


class PrunedLayer(CacheLayerMixin):
    """One decoder layer of the cache: transformers' interface to the store of the layer.

    Methods without a docstring are described by transformers' `CacheLayerMixin`. transformers is
    given logical lengths, as if nothing had been dropped.

    store: keys and values that the layer holds, None before the first token
    raw: whether the store holds every column, so that the model's own masks fit it
    parked: the home of the vision tokens that are parked, None without recall
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
            return key_states, value_states
        prefill = self.shared.prefill
        begins = prefill is not None and self.store.logical <= prefill.prompt.begin
        if self.shared.recall is not None and begins and not self.raw:
            restore(self)
        self.store.append(key_states, value_states)
        return self.store.held()

    def compact(self, plan: KeepPlan, drafts: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep the columns of a plan, in new buffers.

        drafts: keys and values (B, Hkv, T, D) of guessed tokens after the prompt; all are kept
        """
        assert isinstance(self.store, KVStore)
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
        self.parked = self.entered = None

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
        if self.parked is not None:
            self.parked.reorder(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns, which must be text after the last image.

        Raises UnsupportedModeError if that reaches into an image, whose tokens may be dropped.
        """
        columns = abs(tokens_to_remove)
        if self.store is None:
            return
        if int(self.store.logical) - columns < self.shared.last_image:
            raise UnsupportedModeError(
                f"cannot crop {columns} tokens: that reaches into pruned images; start a new cache"
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
        if self.parked is not None:
            self.parked.move(device)


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
    for store in (layer.store, layer.spare, layer.parked):
        if store is not None:
            yield from store.tensors()
