"""A transformers cache whose layers are pruned once their prompt has been read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from plphp.cache import KVStore, Report, StaticStore, allocated, bucketed
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.turn import Turn
from plphp.policy import Policy


class PrunedLayer(CacheLayerMixin):
    """One decoder layer: transformers' interface over a `KVStore`.

    Lengths that transformers asks for are logical ones, as if nothing had been dropped.
    store: what it holds, None before the first token
    raw: whether that is every column, as the model's own masks expect
    """

    is_croppable = True

    def __init__(self, window: int | None, cache: PrunedCache) -> None:
        super().__init__()
        self.window = window
        self.cache = cache
        self.is_sliding = window is not None
        self.store: KVStore | StaticStore | None = None
        self.raw = True
        self.is_compileable = cache.static
        self.home: torch.device | None = None
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
        self.store.append(key_states, value_states)
        return self.store.held()

    def with_recent(self, query: Tensor) -> Tensor:
        """Queries (B, H, T, D) of a forward, after those kept of the chunks before it."""
        return query if self.recent is None else torch.cat([self.recent, query], 2)

    def freeze(self) -> None:
        """Move lengths to the device: what follows is decoding."""
        if isinstance(self.store, KVStore):
            self.store = StaticStore(self.store)

    def thaw(self) -> None:
        """Bring lengths back to the host: what follows is a prompt."""
        if isinstance(self.store, StaticStore):
            self.store = self.store.thaw()

    def get_seq_length(self) -> Any:
        """Columns seen so far, dropped ones included; a tensor while the layer is frozen."""
        return 0 if self.store is None else self.store.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if isinstance(self.store, StaticStore) and self.cache.max_len is not None:
            return self.cache.max_len, 0
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        most = self.cache.max_len
        return most if self.cache.static and most is not None else -1

    def reset(self) -> None:
        self.store, self.raw, self.is_initialized, self.recent = None, True, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.store is not None:
            self.store.reorder(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            rows = torch.arange(len(self.store.keys), device=self.store.keys.device)
            self.store.reorder(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: text after the last image, of which every column is held."""
        columns = abs(tokens_to_remove)
        if self.store is None:
            return
        if int(self.store.logical) - columns < self.cache.last_image:
            raise UnsupportedModeError(
                f"cannot crop {columns} tokens: that reaches into pruned images; start a new cache"
            )
        self.store.crop(columns)

    def offload(self) -> None:
        self.move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.home is not None:
            self.move(self.home)

    def move(self, device: torch.device) -> None:
        """Move what is held; `prefetch` brings it back to where it was computed."""
        if isinstance(self.store, StaticStore):
            raise UnsupportedModeError("a static cache stays on its device")
        if self.store is not None:
            self.home = self.home or self.store.keys.device
            self.store.to(device)


class PrunedCache(Cache):
    """Keys and values of one conversation, pruned turn by turn.

    `generate(..., past_key_values=cache)` on an attached model keeps it for later turns.
    max_len: columns (prompt and answer) to make room for at once; grows as needed without it.
    static: keep lengths on the device and buffers in place, for compiled decoding; needs max_len.
    Holds no gradients: a prompt's own forward can be differentiated, later tokens see constants.
    Raises UnsupportedModeError for a model that is not attached.
    """

    def __init__(self, model: nn.Module, max_len: int | None = None, static: bool = False) -> None:
        from plphp.hf.attach import attached

        pruning = attached(model)
        if pruning is None:
            raise UnsupportedModeError(
                "PrunedCache needs an attached model: call plphp.prune(model) first"
            )
        if static and max_len is None:
            raise ValueError("static=True needs max_len, the columns of prompt and answer together")
        self.config = compat.text_config(pruning.model)
        self.max_len, self.static = max_len, static
        self.policy = pruning.policy
        self.attached = frozenset(pruning.layers)
        self.over_ranks = pruning.over_ranks
        self.turn: Turn | None = None
        self.generating = False  # inside generate(): forwards after the prompt are its steps
        self.report: Report | None = None
        self.shift: Tensor | None = None  # (B,) position minus column of what comes next
        self.last_image = 0  # columns up to the last vision token
        super().__init__(layers=self._layers(0))

    def _layers(self, prompt: int) -> list[Any]:
        """A pruned layer wherever the layer's attention covers a prompt of that many columns.

        Past a sliding window the prompt's last token does not see what would be ranked: such a
        layer, and one of another kind, gets what transformers itself would use.
        """
        layers: list[Any] = compat.stock_layers(self.config)
        for index, window in enumerate(compat.layer_windows(self.config)):
            if compat.covers(window, prompt):
                layers[index] = PrunedLayer(window, self)
        return layers

    def check(self) -> None:
        """Raise UnsupportedModeError if an exception left this cache in the middle of a forward."""
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if self.turn is not None or len(lengths) > 1:
            raise UnsupportedModeError(
                "this cache was interrupted in the middle of a forward; start a new one"
            )

    def settle(self) -> None:
        """End a generate(): a prompt of which nothing was read, after a refusal, is forgotten."""
        self.generating = False
        if self.turn is None:
            return
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if lengths == {self.turn.begin}:
            self.turn = None

    def open(self, turn: Turn, policy: Policy) -> None:
        """Announce a prompt; the forwards that follow bring its columns."""
        self.check()
        self.policy = policy
        for _, layer in self.pruned_layers():
            layer.thaw()
        turn.begin = self.get_seq_length()
        if self.max_len is not None and self.static and turn.end > self.max_len:
            raise ValueError(f"the prompt ends at column {turn.end}, max_len is {self.max_len}")
        if turn.begin == 0:
            self.layers = self._layers(turn.length)
            if self.static and not all(isinstance(layer, PrunedLayer) for layer in self.layers):
                raise UnsupportedModeError(
                    "static=True needs every layer to be prunable; this model has others: "
                    "use static=False"
                )
        turn.static = self.static
        self.turn = turn

    def pruned_layers(self) -> Iterator[tuple[int, PrunedLayer]]:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                yield index, layer

    def prunable(self) -> list[int]:
        """Indices of the layers that are pruned: attached, and with a cache layer of ours."""
        return [index for index, _ in self.pruned_layers() if index in self.attached]

    def reserve(self, longest: int, logical: int) -> int | None:
        """Slots to keep free beside `longest` kept ones of `logical` columns; None by default."""
        if self.max_len is None:
            return None
        more = max(self.max_len - logical, 1)
        return bucketed(longest + more) - longest if self.static else more

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows (B',) in a new order, positions of later turns included."""
        super().reorder_cache(beam_idx)
        if self.shift is not None:
            self.shift = self.shift[beam_idx.to(self.shift.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.shift is not None:
            self.shift = self.shift[indices.to(self.shift.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.shift is not None:
            self.shift = self.shift.repeat_interleave(repeats)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the cache keeps allocated."""
        if self.shift is not None:
            yield self.shift
        for layer in self.layers:
            if not isinstance(layer, PrunedLayer):
                yield from compat.held_tensors(layer)
            elif layer.store is not None:
                yield from layer.store.tensors()

    def move(self, device: torch.device | str) -> None:
        """Move every layer to a device.

        Not named `to`: accelerate calls that on every argument of a module that it dispatches.
        """
        for _, layer in self.pruned_layers():
            layer.move(torch.device(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the conversation to a safetensors file; see `storage.save_cache`."""
        from plphp.hf.storage import save_cache

        save_cache(self, path)

    @classmethod
    def load(cls, model: Any, path: str | os.PathLike[str]) -> PrunedCache:
        """Read a conversation that `save` wrote, for an attached model of the same kind."""
        from plphp.hf.storage import load_cache

        return load_cache(model, path)

    def kv_bytes(self) -> int:
        """Bytes allocated for this cache, counted by storage."""
        return allocated(self.tensors())


def own_cache(cache: Any, model: Any) -> PrunedCache:
    """The cache that a call brought, or a new one. Raises UnsupportedModeError for any other."""
    if cache is None:
        return PrunedCache(model)
    if not isinstance(cache, PrunedCache):
        raise UnsupportedModeError(
            f"an attached model cannot use a {type(cache).__name__}: pass "
            "past_key_values=plphp.PrunedCache(model), or none"
        )
    if cache.config is not compat.text_config(model):
        raise UnsupportedModeError("this cache belongs to another model; make one for this model")
    return cache
