"""Chunked prefill with a sequence method: the tokens that stay are chosen before they leave.

A chunk shows a method a part of the prompt only. Before layer 0, generate() first runs the whole
prompt up to layer 0, where the method chooses as it does without chunks, from the embeddings of all
text and images. No layer runs then, and transformers has encoded the images before.

A method that chooses inside the decoder, before layer K, reads what layer K - 1 has made of the
whole prompt. So generate() first reads all chunks into a copy of the cache. In it the layers from K
on do nothing, and the method chooses at the last chunk. The copy is dropped, so that layers before
K are computed twice. Either way the chunks follow, without the tokens that were dropped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn

from plphp.hf import compat
from plphp.hf.cache import PrunedCache
from plphp.hf.prompt import Prefill
from plphp.policy import HiddenPolicy, Policy, sequence_stage

PREFILL = "_prefill"  # the method of a model with which generate() reads the prompt


class Planned(Exception):
    """Ends a forward before layer 0, once the tokens that stay are chosen."""


def read_twice(policy: Policy, layers: int) -> int:
    """How many layers read the prompt twice where it comes in chunks, 0 for most policies.

    layers: number of layers of the decoder
    """
    first = sequence_stage(policy)
    if first is None or (isinstance(first, HiddenPolicy) and not first.reads_hidden):
        return 0
    return first.leave_at(layers)


def reading(kwargs: dict[str, Any]) -> tuple[Any, Prefill | None]:
    """The cache among the arguments of a forward, and the prompt that it reads; None for none."""
    cache = compat.given_cache(kwargs)
    return cache, cache.shared.prefill if isinstance(cache, PrunedCache) else None


def plan_ahead(original: Callable[..., Any], twice: int) -> Callable[..., Any]:
    """The method of a model that reads the prompt, changed to let a method choose before chunks.

    original: transformers' `_prefill`; twice: as `read_twice` returns it
    """

    @wraps(original)
    def read(ids: Any, config: Any, model_kwargs: dict[str, Any], *rest: Any, **more: Any) -> Any:
        (cache, prefill), size = reading(model_kwargs), config.prefill_chunk_size
        if prefill is None or size is None or size >= prefill.prompt.length:
            return original(ids, config, model_kwargs, *rest, **more)
        first, trial = copy.copy(config), cache.begun_copy(twice) if twice else cache
        first.disable_compile = True
        if not twice:
            first.prefill_chunk_size = None
        given = compat.with_cache(model_kwargs, compat.CACHE, trial)
        plans: Prefill = trial.shared.prefill
        plans.plans_now = True
        try:
            original(ids, first, given, *rest, **more)
        except Planned:
            pass
        finally:
            plans.plans_now = False
        prefill.located, prefill.ahead = plans.located, True
        prefill.planned, prefill.remaining = plans.remaining, None
        del given, trial, plans
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
    raise Planned


def choose_at_the_end(
    choose: Callable[[Prefill, PrunedCache, Any], None] | None,
    module: nn.Module,
    args: Any,
    kwargs: Any,
) -> None:
    """Forward pre-hook of layer K: if these chunks are there to plan, choose at the last one.

    choose: as in `stop_here`; None for a method that has chosen in layer K - 1
    """
    cache, prefill = reading(kwargs)
    if prefill is None or not prefill.plans_now or choose is None:
        return
    prefill.pieces.append(args[0])
    if prefill.reads_last:
        choose(prefill, cache, torch.cat(prefill.pieces, 1))


def idle_while_planning(
    original: Callable[..., Any], hidden: Any, *args: Any, **kwargs: Any
) -> Any:
    """The forward of a layer from K on, changed to do nothing where chunks are there to plan."""
    _, prefill = reading(kwargs)
    if prefill is not None and prefill.plans_now:
        return hidden
    return original(hidden, *args, **kwargs)
