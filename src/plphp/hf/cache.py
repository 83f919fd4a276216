"""A transformers cache whose layers are pruned once their prompt has been read."""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from plphp.cache import allocated
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.attached import Pruning, attached
from plphp.hf.layer import PrunedLayer, Shared, spans_until
from plphp.hf.prompt import Prefill, Prompt
from plphp.policy.base import check_count
from plphp.report import EarlierImage, Report


class PrunedCache(Cache):
    """Keys and values of one conversation, pruned turn by turn.

    `generate(..., cache=cache)` on an attached model keeps it for later turns. The name that the
    keyword had before transformers 5.24, `past_key_values`, is accepted too, by every version.
    max_len: columns (prompt and answer) to make room for at once; grows as needed without it.
    static: keep lengths on the device and buffers in place, for compiled decoding; needs max_len.
    report: of the last prompt that was read into this cache, None before the first; exact where
        several threads generate on one model
    Holds no gradients: a prompt's own forward can be differentiated, later tokens see constants.
    It works with the attached model only, and under the `recall` that it was made for.
    `copy.deepcopy` makes an independent conversation of it; `save` and `load` keep it in a file.
    Raises UnsupportedModeError for a model that is not attached.
    """

    def __init__(self, model: nn.Module, max_len: int | None = None, static: bool = False) -> None:
        if max_len is not None:
            check_count("max_len", max_len, 1)
        pruning = attached(model)
        if pruning is None:
            raise UnsupportedModeError(
                "PrunedCache needs an attached model: call plphp.prune(model) first"
            )
        if static and max_len is None:
            raise ValueError("static=True needs max_len, the columns of prompt and answer together")
        if static and pruning.recall is not None:
            raise UnsupportedModeError(
                "recall chooses tokens between the kernels of a step: use static=False"
            )
        self.shared = Shared(
            config=compat.text_config(pruning.model),
            max_len=max_len,
            static=static,
            policy=pruning.policy,
            attached=frozenset(pruning.layers),
            over_ranks=pruning.over_ranks,
            recall=pruning.recall,
        )
        self._model = weakref.ref(pruning.model)  # a file says which model it belongs to
        self.report: Report | None = None
        self.shift: Tensor | None = None  # (B,) position minus column of what comes next
        self._generating = False  # inside generate(): forwards after the prompt are its steps
        self._in_forward = False  # inside a forward of the attached model: it may be written to
        self._order: Tensor | None = None  # (B,) rows of the report that ours are, None: all
        self._found: tuple[EarlierImage, ...] = ()  # what a file said in place of a report
        super().__init__(layers=self._layers(0))

    def _layers(self, prompt: int) -> list[Any]:
        """A pruned layer wherever the layer's attention covers a prompt of that many columns.

        Past a sliding window the prompt's last token does not see what would be ranked: such a
        layer, and one of another kind, gets what transformers itself would use.
        """
        layers: list[Any] = compat.stock_layers(self.config)
        own = []
        for index, window in enumerate(compat.layer_windows(self.config)):
            if compat.covers(window, prompt):
                layers[index] = PrunedLayer(window, self.shared)
                own.append(index)
        self.shared.depth = len(layers)
        self.shared.prunable = tuple(index for index in own if index in self.shared.attached)
        return layers

    def _renewed(self, prompt: int) -> list[Any]:
        """Layers for a first prompt, with the static buffers that `reset` left behind."""
        before = dict(self.pruned_layers())
        layers = self._layers(prompt)
        for index, layer in enumerate(layers):
            if isinstance(layer, PrunedLayer) and index in before:
                layer.spare = before[index].spare
        return layers

    @property
    def config(self) -> Any:
        """Config of the language model that the cache belongs to."""
        return self.shared.config

    @property
    def static(self) -> bool:
        """Whether lengths are on the device."""
        return self.shared.static

    @property
    def max_len(self) -> int | None:
        """Columns that there is room for, None for as many as come."""
        return self.shared.max_len

    def check(self) -> None:
        """Raise UnsupportedModeError if an exception left this cache in the middle of a forward."""
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if self.shared.prefill is not None or len(lengths) > 1:
            raise UnsupportedModeError(
                "this cache was interrupted in the middle of a forward; start a new one"
            )

    def _settle(self) -> None:
        """End a generate(): a prompt of which nothing was read, after a refusal, is forgotten."""
        self._generating = False
        if self.shared.prefill is None:
            return
        lengths = {int(layer.get_seq_length()) for _, layer in self.pruned_layers()}
        if lengths == {self.shared.prefill.prompt.begin}:
            self.shared.prefill = None

    def _begin(
        self, length: int, source: Mapping[str, Any], pruning: Pruning, generating: bool = False
    ) -> Prefill:
        """Announce a prompt of `length` columns; the forwards that follow bring them.

        source: the keyword arguments that describe the prompt
        generating: whether generate() brings it; the forwards after the prompt are its steps then
        """
        self.check()
        self.shared.policy = pruning.policy
        for _, layer in self.pruned_layers():
            layer.thaw()
        begin = int(self.get_seq_length())
        spans = self.shared.spans if self.shared.recall is not None and begin else None
        earlier = None if spans is None else spans_until(spans, begin)
        prompt = Prompt(
            begin, length, source, pruning.model.config, pruning.vision_mask, earlier, self.static
        )
        if self.max_len is not None and self.static and prompt.end > self.max_len:
            raise ValueError(f"the prompt ends at column {prompt.end}, max_len is {self.max_len}")
        if begin == 0:
            self.layers = self._renewed(length)
            if self.static and not all(isinstance(layer, PrunedLayer) for layer in self.layers):
                raise UnsupportedModeError(
                    "static=True needs every layer to be prunable; this model has others: "
                    "use static=False"
                )
        self.shared.prefill, self._generating = Prefill(prompt), generating
        return self.shared.prefill

    def _finish(self, report: Report) -> None:
        """Take the report of the prompt that has just been read."""
        assert self.shared.prefill is not None
        where = self.shared.prefill.where
        self.report, self._order = report, None
        self.shared.last_image = max(self.shared.last_image, where.last_image)
        self.shared.spans = where.spans if self.shared.recall is not None else None
        self.shared.prefill = None

    def _written(self) -> None:
        """Raise UnsupportedModeError for a model that would read what is held as it stands."""
        if not self._in_forward:
            raise UnsupportedModeError(
                "this plphp.PrunedCache was given to a model that is not attached, or to a part of "
                "a model: attach it with plphp.prune(model) and call the model itself; without "
                "pruning, use a cache of transformers'"
            )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: append keys and values of one layer."""
        self._written()
        return super().update(*args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: replace the state of a convolution."""
        self._written()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' interface: replace the state of a recurrent layer."""
        self._written()
        return super().update_recurrent_state(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedCache:
        """A conversation of its own, for the same attached model."""
        self.check()
        shared, report = self.shared, self.report
        # What belongs to the model, and what never changes, stays one object.
        for one in (shared.config, shared.policy, shared.recall, shared.over_ranks):
            memo[id(one)] = one
        if report is not None:
            memo[id(report.seen)] = report.seen
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy({**vars(self), "_in_forward": False}, memo)
        return copied

    def __copy__(self) -> PrunedCache:
        raise UnsupportedModeError("two caches cannot share their layers: use copy.deepcopy")

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(
            "a plphp.PrunedCache cannot be pickled: cache.save(path) writes it, and "
            "plphp.PrunedCache.load(model, path) reads it"
        )

    def pruned_layers(self) -> Iterator[tuple[int, PrunedLayer]]:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, PrunedLayer):
                yield index, layer

    def reset(self) -> None:
        """Forget the conversation. A static cache keeps its buffers for the next one."""
        super().reset()
        self.shift, self.report, self._generating = None, None, False
        self._order, self._found = None, ()
        self.shared.prefill, self.shared.last_image, self.shared.spans = None, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows (B',) in a new order, positions of later turns included."""
        super().reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.shift is not None:
            self._rows(torch.arange(len(self.shift)).repeat_interleave(repeats))

    def _rows(self, rows: Tensor) -> None:
        """Rows (B',) of what the cache itself knows of each."""
        if self.shift is not None:
            self.shift = self.shift[rows.to(self.shift.device)]
        if self.shared.spans is not None:
            self.shared.spans = self.shared.spans[rows.to(self.shared.spans.device)]
        self._order = rows if self._order is None else self._order[rows.to(self._order.device)]

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that the cache keeps allocated."""
        if self.shift is not None:
            yield self.shift
        for layer in self.layers:
            yield from layer_tensors(layer)

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

    def recalled(self) -> list[list[Tensor]]:
        """What was read of the images at every step; see `plphp.hf.recall.recalled`."""
        from plphp.hf.recall import recalled

        return recalled(self)

    def kv_bytes(self) -> int:
        """Bytes allocated for this cache, counted by storage."""
        return allocated(self.tensors())


def layer_tensors(layer: Any) -> Iterator[Tensor]:
    """Every tensor that one layer keeps allocated, ours or one of transformers'."""
    if not isinstance(layer, PrunedLayer):
        yield from compat.held_tensors(layer)
        return
    for store in (layer.store, layer.spare, layer.parked):
        if store is not None:
            yield from store.tensors()
