"""The cache of one conversation, whose layers are pruned after each prompt."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from plphp.cache import StaticStore, allocated
from plphp.errors import InputError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning, attached
from plphp.hf.later_turn import History
from plphp.hf.layer import PrunedLayer, layer_tensors
from plphp.hf.located import spans_until
from plphp.hf.prompt import Prefill, Prompt
from plphp.hf.recall import recalled
from plphp.hf.shared import shared_by
from plphp.policy import sequence_stage
from plphp.report import EarlierImage, Report


class Conversation(Cache):
    """Keys and values of one conversation; see `PrunedCache`, which also stores it in files."""

    def __init__(self, model: nn.Module, max_len: int | None = None, static: bool = False) -> None:
        pruning = attached(model)
        if pruning is None:
            raise UnsupportedModeError(
                "PrunedCache needs an attached model: call plphp.prune(model) first"
            )
        self.shared = shared_by(pruning, max_len, static)
        self._model = weakref.ref(pruning.model)  # a file says which model it belongs to
        self.report: Report | None = None
        self.shift: Tensor | None = None  # (B,) position id minus column of new text
        self._generating = False  # whether generate() runs: forwards after the prompt are its steps
        self._in_forward = False  # whether the attached model runs: it alone may write to the cache
        self._order: Tensor | None = None  # (B,) rows of the report, where the cache has others
        self._found: tuple[EarlierImage, ...] = ()  # read from a file that has no report
        self._history = History()
        super().__init__(layers=self._layers(0))

    def _layers(self, prompt: int) -> list[Any]:
        """New layers for a prompt of `prompt` columns, pruned ones where that is possible.

        If a sliding window is shorter than the prompt, the last token cannot score all vision
        tokens. Such a layer, and one of another kind, is what transformers itself would use. If
        tokens leave the hidden states, it needs to know which columns it holds, as pruned ones do.
        """
        leaves = sequence_stage(self.shared.policy) is not None
        layers: list[Any] = compat.stock_layers(self.config)
        pruned = []
        for index, window in enumerate(compat.layer_windows(self.config)):
            if isinstance(window, str):
                continue
            covers = compat.covers(window, prompt)
            if covers or leaves:
                layers[index] = PrunedLayer(window, self.shared)
            if covers:
                pruned.append(index)
        self.shared.depth = len(layers)
        self.shared.prunable = tuple(index for index in pruned if index in self.shared.attached)
        return layers

    def _renewed(self, prompt: int) -> list[Any]:
        """New layers for a first prompt. They reuse the static buffers that `reset` left."""
        before = dict(self.pruned_layers())
        layers = self._layers(prompt)
        for index, layer in enumerate(layers):
            if isinstance(layer, PrunedLayer) and index in before:
                layer.spare = before[index].spare
        return layers

    @property
    def config(self) -> Any:
        """Config of the language model to which the cache belongs."""
        return self.shared.config

    @property
    def static(self) -> bool:
        """Whether lengths are on the device."""
        return self.shared.static

    @property
    def max_len(self) -> int | None:
        """Columns for which buffers are allocated at once, None if they grow as needed."""
        return self.shared.max_len

    @property
    def frozen(self) -> bool:
        """Whether the lengths are on the device now: a static cache that has read its prompt."""
        read = self.shared.prefill is None
        stores = (layer.store for _, layer in self.pruned_layers())
        return read and any(isinstance(store, StaticStore) for store in stores)

    def check(self) -> None:
        """Raise UnsupportedModeError if an exception left this cache in the middle of a forward."""
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if self.shared.prefill is not None or len(lengths) > 1:
            raise UnsupportedModeError(
                "this cache was interrupted in the middle of a forward; start a new one"
            )

    def _settle(self) -> None:
        """End a generate(). Forget its prompt if an error was raised before any of it was read."""
        self._generating = False
        if self.shared.prefill is None:
            return
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if lengths == {self.shared.prefill.prompt.begin}:
            self.shared.prefill = None

    def _begin(
        self, length: int, source: Mapping[str, Any], pruning: Pruning, generating: bool = False
    ) -> Prefill:
        """Begin a prompt of `length` columns, which the next forwards bring.

        source: the keyword arguments that describe the prompt
        generating: whether generate() brings it; then forwards after the prompt are its steps
        """
        self.check()
        self.shared.policy = pruning.policy
        for _, layer in self.pruned_layers():
            layer.thaw()
        begin = int(self.get_seq_length())
        self._history.begin(source, pruning.model.config, begin, length)
        spans = self.shared.spans if self.shared.recall is not None and begin else None
        earlier = None if spans is None else spans_until(spans, begin)
        prompt = Prompt(
            begin,
            length,
            source,
            pruning.model.config,
            pruning.vision_mask,
            earlier,
            self.shared.compacts_all,
        )
        if self.max_len is not None and self.static and prompt.end > self.max_len:
            raise InputError(f"the prompt ends at column {prompt.end}, max_len is {self.max_len}")
        if begin == 0:
            self.layers = self._renewed(length)
            if self.static and len(self.shared.prunable) < len(self.layers):
                raise UnsupportedModeError(
                    "static=True needs every layer to be prunable; this model has others: "
                    "use static=False"
                )
        self.shared.prefill, self._generating = Prefill(prompt), generating
        return self.shared.prefill

    def _finish(self, report: Report) -> None:
        """End a prompt that has been read, and store its report."""
        assert self.shared.prefill is not None
        where = self.shared.prefill.where
        self.report, self._order = report, None
        coded_text = self.shared.kept is not None and self.shared.kept.text
        last = where.end if coded_text else where.last_image
        self.shared.last_image = max(self.shared.last_image, last)
        self.shared.spans = where.spans if self.shared.recall is not None else None
        self.shared.prefill = None

    def _check_writer(self) -> None:
        """Raise UnsupportedModeError unless the attached model runs: others need every column."""
        if not self._in_forward:
            raise UnsupportedModeError(
                "this plphp.PrunedCache is used by a model that is not attached, or by part of a "
                "model: call plphp.prune(model) and then the model itself, and let a generate() in "
                "another thread end before the `with` block does; without pruning, use a cache of "
                "transformers"
            )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: append keys and values of one layer."""
        self._check_writer()
        return super().update(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: replace the state of a convolution."""
        self._check_writer()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: replace the state of a recurrent layer."""
        self._check_writer()
        return super().update_recurrent_state(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """An independent conversation, for the same attached model."""
        self.check()
        return self._copied(memo)

    def begun_copy(self, layers: int) -> Conversation:
        """A copy of a cache whose prompt has begun, to read that prompt and then to be dropped.

        layers: how many layers the copy has of its own; it shares the others, and must not use them
        """
        assert self.shared.prefill is not None
        kept = (self.shared.prefill.prompt, *self.layers[layers:])
        return self._copied({id(item): item for item in kept})

    def _copied(self, memo: dict[int, Any]) -> Conversation:
        """A copy. memo: as of copy.deepcopy, with the objects that are not copied."""
        shared, report = self.shared, self.report
        # Objects that belong to the model or never change are not copied.
        for item in (shared.config, shared.policy, shared.recall, shared.kept, shared.over_ranks):
            memo[id(item)] = item
        if report is not None:
            memo[id(report.seen)] = report.seen
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy({**vars(self), "_in_forward": False}, memo)
        return copied

    def __copy__(self) -> Conversation:
        raise UnsupportedModeError("two caches cannot share their layers: use copy.deepcopy")

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(
            "a plphp.PrunedCache cannot be pickled: cache.save(path) writes it, and "
            "plphp.PrunedCache.load(model, path) reads it"
        )

    def pruned_layers(self) -> Iterator[tuple[int, PrunedLayer]]:
        """Index and layer of every pruned layer."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                yield index, layer

    def reset(self) -> None:
        """Forget the conversation. A static cache keeps its buffers for the next conversation."""
        super().reset()
        self.shift, self.report, self._generating = None, None, False
        self._order, self._found = None, ()
        self._history.forget()
        self.shared.prefill, self.shared.last_image, self.shared.spans = None, 0, None

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """transformers' interface: forget the last columns."""
        super().crop(*args, **kwargs)
        self._history.cut(int(self.get_seq_length()))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """transformers' interface: put the rows in the order (B',) int64, as beam search does."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """transformers' interface: keep these rows (B',) only."""
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """transformers' interface: repeat every row."""
        super().batch_repeat_interleave(repeats)
        if self.shift is not None:
            self._rows(torch.arange(len(self.shift)).repeat_interleave(repeats))

    def _rows(self, rows: Tensor) -> None:
        """Select rows (B',) of the state that the cache itself holds for each row."""
        if self.shift is not None:
            self.shift = self.shift[rows.to(self.shift.device)]
        if self.shared.spans is not None:
            self.shared.spans = self.shared.spans[rows.to(self.shared.spans.device)]
        self._history.forget()
        self._order = rows if self._order is None else self._order[rows.to(self._order.device)]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the cache keeps allocated."""
        if self.shift is not None:
            yield self.shift
        for layer in self.layers:
            yield from layer_tensors(layer)

    def move(self, device: torch.device | str) -> None:
        """Move every pruned layer to a device. Raises UnsupportedModeError for a static cache.

        The name is not `to`, because accelerate calls `to` on every argument of a module.
        """
        for _, layer in self.pruned_layers():
            layer.move(torch.device(device))

    def recalled(self) -> list[list[Tensor]]:
        """The vision tokens that were read, if `Recall(record=True)` was given.

        One list a layer, with one tensor (B, Hkv, k) int64 on the CPU a token decoded since the
        last prompt: row-logical positions, ascending, filled up with -1.
        """
        return recalled(self.layers)

    def kv_bytes(self) -> int:
        """Bytes allocated for this cache: the sizes of the distinct storages of its tensors.

        The token ids that generate() was given and returned are not counted: 8 bytes a token, which
        are kept to check that the next turn continues them.
        """
        return allocated(self.tensors())
