"""One decoder layer of a pruned cache, and what the layers of a conversation share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from plphp.cache import KVStore, StaticStore, bucketed
from plphp.errors import UnsupportedModeError
from plphp.hf.prompt import Prefill
from plphp.policy import KeepPlan, Policy
from plphp.recall import Home, Recall


@dataclass
class Shared:
    """What the layers of one conversation know in common.

    It knows no layer: a cache that its own layers pointed back to would wait for Python's garbage
    collector, and keys and values of finished generations with it.

    config: of the language model; max_len, static: as given to `PrunedCache`
    attached: indices of the layers that pruning is attached to
    over_ranks: mean over tensor-parallel ranks, None without them
    depth, prunable: how many layers there are, and the indices of those that are pruned
    prefill: the state of the prompt that is being read, None between prompts
    last_image: columns up to the last vision token
    watch: called after a layer's attention, see `attention_probe`
    recall: what becomes of dropped tokens, None to destroy them
    spans: (B, columns) of all prompts read so far, kept for recall
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

    def reserve(self, longest: int, logical: int) -> int | None:
        """Slots to keep free beside `longest` kept ones of `logical` columns; None by default."""
        if self.max_len is None:
            return None
        more = max(self.max_len - logical, 1)
        return bucketed(longest + more) - longest if self.static else more


class PrunedLayer(CacheLayerMixin):
    """One decoder layer: transformers' interface over a `KVStore`.

    Lengths that transformers asks for are logical ones, as if nothing had been dropped.
    store: what it holds, None before the first token
    raw: whether that is every column, as the model's own masks expect
    parked: the vision tokens that are not in the store, with recall
    spare: static buffers of a conversation that `reset` ended, to be filled again
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
        self.recent: Tensor | None = None  # the last queries of a prompt that comes in chunks

    @property
    def keys(self) -> Tensor | None:
        """(B, Hkv, slots, D) of what is held, as transformers' own layers show it."""
        return self.store.held()[0] if isinstance(self.store, KVStore) else None

    @keys.setter
    def keys(self, value: None) -> None: ...  # set to None by the mixin

    @property
    def values(self) -> Tensor | None:
        return self.store.held()[1] if isinstance(self.store, KVStore) else None

    @values.setter
    def values(self, value: None) -> None: ...

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, Hkv, T, D); return all that is held."""
        if self.store is None:
            self.is_initialized = True
            self.store = KVStore(key_states, value_states, self.window)
            return key_states, value_states
        if self.shared.recall is not None and self.shared.prefill is not None and not self.raw:
            restore(self)
        self.store.append(key_states, value_states)
        return self.store.held()

    def with_recent(self, query: Tensor) -> Tensor:
        """Queries (B, H, T, D) of a forward, after those kept of the chunks before it."""
        return query if self.recent is None else torch.cat([self.recent, query], 2)

    def compact(self, plan: KeepPlan, drafts: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep what a plan says. drafts: keys and values that came after the prompt, kept whole."""
        assert isinstance(self.store, KVStore)
        longest = plan.columns.shape[-1]
        self.store.compact(plan, self.shared.reserve(longest, self.store.logical))
        if drafts is not None:
            self.store.append(*drafts)
        self.raw = False
        if self.shared.static:
            self._freeze(self.store)

    def _freeze(self, store: KVStore) -> None:
        """Move lengths to the device: what follows is decoding.

        Buffers of the prompt before are filled again where they fit: a CUDA graph that was
        captured over them is replayed, and nothing is allocated.
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
        most = self.shared.max_len
        return most if self.shared.static and most is not None else -1

    def reset(self) -> None:
        self.spare = self.store if isinstance(self.store, StaticStore) else None
        self.store, self.raw, self.is_initialized, self.recent = None, True, False, None
        self.parked = None

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
        """Rows (B',) of what is held and parked."""
        assert self.store is not None
        self.store.reorder(rows)
        if self.parked is not None:
            self.parked.reorder(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: text after the last image, of which every column is held."""
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
        """Move what is held; `prefetch` brings it back to where it was computed."""
        if isinstance(self.store, StaticStore):
            raise UnsupportedModeError("a static cache stays on its device")
        if self.store is not None:
            self.compute_device = self.compute_device or self.store.keys.device
            self.store.to(device)
        if self.parked is not None:
            self.parked.move(device)


def restore(layer: PrunedLayer) -> None:
    """Make a layer hold every column again, for a prompt that reads the whole conversation."""
    store, home, spans = layer.store, layer.parked, layer.shared.spans
    assert isinstance(store, KVStore) and spans is not None
    spans = spans_until(spans.to(store.start.device), store.logical)
    heads = (-1, store.keys.shape[1], -1)
    text, vision = ((where[:, None]).expand(heads) for where in (spans == 0, spans > 0))
    used = torch.arange(store.end, device=spans.device) >= store.start[:, None, None]
    used = used.expand(heads)
    found = None if home is None else home.tokens(store)
    if home is not None:
        used = used & ~home.vision_slots(store)
    whole = []
    for number, held in enumerate(store.held()):
        full = held.new_zeros(*held.shape[:2], store.logical, held.shape[-1])
        full[text] = held[used]
        if found is not None:
            full[vision] = found[number]
        whole.append(full)
    layer.store = KVStore(whole[0], whole[1], layer.window)
    layer.raw, layer.parked = True, None


def spans_until(spans: Tensor, columns: int) -> Tensor:
    """(B, columns) of the spans of a conversation; what was answered since is text."""
    spans = spans[:, :columns]
    return torch.nn.functional.pad(spans, (0, columns - spans.shape[1]))
