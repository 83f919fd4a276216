"""Pruning that is attached to a model, and the mark by which it is found."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.vision_mask import Mask
from plphp.policy import Policy
from plphp.recall import Recall
from plphp.report import Report

MARK = "_plphp"  # attribute of an attached model that holds its Pruning
COPIED = "an attached model cannot be copied: remove() the pruning first"
SAVED = "an attached model cannot be saved: remove() the pruning first"


class Pruning:
    """Pruning attached to one model object; `remove()` or leaving the `with` takes it off.

    Entering a `with` after `remove()` attaches it again.

    report: of the last finished prefill; `cache.report` of a `PrunedCache` is exact where several
        threads generate on one model
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        vision_mask: Mask,
        recall: Recall | None,
        attach: Callable[[Pruning], None],
    ) -> None:
        self.model = model
        self.policy = policy
        self.recall = recall
        self.vision_mask = vision_mask
        self.report: Report | None = None
        self.layers: tuple[int, ...] = ()  # decoder layers that are attached
        self.decoder: list[nn.Module] = []  # the modules of those layers
        self.over_ranks = compat.over_ranks(model)
        self.calls = threading.local()  # `left_out` while a generate() runs in this thread
        self._undo: list[Callable[[], None]] = []
        self._entered = False
        self._attach = attach
        attach(self)

    def __enter__(self) -> Pruning:
        if self._entered:
            raise UnsupportedModeError("an outer `with` has entered this pruning already")
        if not self._undo:
            self._attach(self)
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was. Safe to call twice."""
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedModeError(COPIED)

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(SAVED)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute; undone by restoring what the instance itself held."""
        before = vars(owner).get(name)
        had = name in vars(owner)
        setattr(owner, name, value)
        undo = (lambda: setattr(owner, name, before)) if had else (lambda: delattr(owner, name))
        self._undo.append(undo)


def attached(model: Any) -> Pruning | None:
    """The pruning attached to a model, if any."""
    found: Pruning | None = getattr(base_model(model), "__dict__", {}).get(MARK)
    return found


def base_model(model: Any) -> Any:
    """The transformers model inside the wrappers of torch.compile and PEFT."""
    while True:
        if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
