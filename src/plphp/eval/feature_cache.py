"""A cache of the features of images and videos, which no pruning of the KV cache changes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from plphp.hf.attached import attached
from plphp.hf.tower import tower_method

NAMES = ("get_image_features", "get_video_features")


@contextmanager
def remembered(model: Any) -> Iterator[None]:
    """Within this context the model computes the features of the same pixel tensors only once.

    The run must not use gradients or change the features in place. The model is restored
    afterwards. A model without the methods of `NAMES` is not changed. While a method is attached
    that chooses in the vision tower and changes the features, nothing is remembered or reused.
    """
    with ExitStack() as changed:
        for name in NAMES:
            owner = _owner(model, name)
            if owner is not None:
                changed.enter_context(_remembered(model, owner, name))
        yield


@contextmanager
def _remembered(model: Any, owner: Any, name: str) -> Iterator[None]:
    """Within this context the method `name` of a module is called once for the same pixels."""
    original = getattr(owner, name)
    known: list[tuple[Any, Any, Any]] = []

    @functools.wraps(original)  # generate() reads its signature
    def recalled(*args: Any, **kwargs: Any) -> Any:
        if _in_tower(model):
            return original(*args, **kwargs)
        for before, options, features in known:
            if _same(before, args) and _same(options, kwargs):
                return features
        features = original(*args, **kwargs)
        known.append((args, kwargs, features))
        return features

    had = name in vars(owner)
    setattr(owner, name, recalled)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def _owner(model: Any, name: str) -> Any:
    """The innermost module whose forward calls the method `name`, or None."""
    inside = [m for m in (getattr(model, "model", None), model) if hasattr(m, name)]
    return inside[0] if inside else None


def _in_tower(model: Any) -> bool:
    """Whether a method is attached to the model that chooses in its vision tower."""
    pruning = attached(model)
    return pruning is not None and tower_method(pruning.policy) is not None


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal. Tensors are equal only if they are the same object."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return bool(one == other)
