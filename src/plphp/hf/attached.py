"""`Pruning`, the object that is attached to a model, and how to find it on a model."""

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
from plphp.recall import KeptBits, Recall
from plphp.report import Report

MARK = "_plphp"  # name of the attribute of an attached model that holds its Pruning
COPIED = "an attached model cannot be copied: remove() the pruning first"
SAVED = "an attached model cannot be saved: remove() the pruning first"


class Pruning:
    """What `plphp.prune` returns: a pruning that is attached to one model object.

    `remove()`, or leaving the `with` block, detaches it. Entering a `with` block after `remove()`
    attaches it again.

    report: `Report` of the last finished prefill on this model, None before the first. Where
        several threads generate on one model, read `PrunedCache.report`: each cache has its own

    Entering raises UnsupportedModeError while another `with` block has entered the same pruning.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy,
        vision_mask: Mask,
        recall: Recall | None,
        kept: KeptBits | None,
        attach: Callable[[Pruning], None],
    ) -> None:
        self.model = model
        self.policy = policy
        self.recall = recall
        self.kept = kept
        self.vision_mask = vision_mask
        self.report: Report | None = None
        self.layers: tuple[int, ...] = ()  # indices of the attached decoder layers
        self.decoder: list[nn.Module] = []  # the modules of those layers
        self.over_ranks = compat.over_ranks(model)
        # Has the attribute `left_out` in a thread while a generate() runs in it, and `condensed`
        # while a prompt is read: whether a method has chosen in the vision tower, see `tower`.
        self.calls = threading.local()
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
        """Detach, so that the model is as it was before. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise UnsupportedModeError(COPIED)

    def __reduce__(self) -> Any:
        raise UnsupportedModeError(SAVED)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance. `remove` restores the instance's own value, or none."""
        before = vars(owner).get(name)
        had = name in vars(owner)
        setattr(owner, name, value)
        undo = (lambda: setattr(owner, name, before)) if had else (lambda: delattr(owner, name))
        self._undo.append(undo)


def attached(model: Any) -> Pruning | None:
    """The pruning that is attached to a model, or None."""
    pruning: Pruning | None = getattr(base_model(model), "__dict__", {}).get(MARK)
    return pruning


def base_model(model: Any) -> Any:
    """The transformers model inside the wrappers of torch.compile and PEFT."""
    while True:
        if isinstance(model, nn.Module) and "_orig_mod" in model._modules:
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model
