"""Chunked prefill with a sequence method: the tokens that stay are chosen before the first chunk.

A chunk shows a method a part of the prompt, and layer 0 has computed it before the next one comes.
So generate() first runs the whole prompt up to layer 0, where the method chooses as it does without
chunks, from the embeddings of all text and images. No layer runs then, and transformers has encoded
the images before. The chunks follow, each without the tokens that were dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from plphp.hf import compat
from plphp.hf.cache import PrunedCache
from plphp.hf.prompt import Prefill
from plphp.policy import HiddenPolicy, Policy, sequence_stage

PREFILL = "_prefill"  # the method of a model with which generate() reads the prompt


class Planned(Exception):
    """Ends a forward before layer 0, once the tokens that stay are chosen."""


def can_plan(policy: Policy, model: Any) -> bool:
    """Whether the sequence method of a policy can choose before any layer runs."""
    first = sequence_stage(policy)
    if not isinstance(first, HiddenPolicy) or not hasattr(model, PREFILL):
        return False
    layers = len(compat.layer_windows(compat.text_config(model)))
    return not first.reads_hidden or first.leave_at(layers) == 0


def reading(kwargs: dict[str, Any]) -> tuple[Any, Prefill | None]:
    """The cache among the arguments of a forward, and the prompt that it reads; None for none."""
    cache = compat.given_cache(kwargs)
    return cache, cache.shared.prefill if isinstance(cache, PrunedCache) else None


def plan_ahead(original: Callable[..., Any]) -> Callable[..., Any]:
    """The method of a model that reads the prompt, changed to let a method choose before chunks.

    original: transformers' `_prefill`
    """

    @wraps(original)
    def read(ids: Any, config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        (_, prefill), size = reading(model_kwargs), config.prefill_chunk_size
        if prefill is None or size is None or size >= prefill.prompt.length:
            return original(ids, config, model_kwargs, *rest, **more)
        whole = copy.copy(config)
        whole.prefill_chunk_size = None
        prefill.plans_now = True
        try:
            original(ids, whole, dict(model_kwargs), *rest, **more)
        except Planned:
            pass
        finally:
            prefill.plans_now = False
        return original(ids, config, model_kwargs, *rest, **more)

    return read


def stop_here(
    choose: Callable[[Prefill, PrunedCache, Any], None], module: nn.Module, args: Any, kwargs: Any
) -> None:
    """Forward pre-hook of layer 0: if this forward is there to plan, let the method choose.

    choose: given the prompt, its cache and the hidden states (B, N, E)
    Raises Planned then.
    """
    cache, prefill = reading(kwargs)
    if prefill is None or not prefill.plans_now:
        return
    choose(prefill, cache, args[0])
    prefill.planned, prefill.remaining, prefill.ahead = prefill.remaining, None, True
    raise Planned
