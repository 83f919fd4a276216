"""Recall inside a cache: parked when a prompt has been read, whole again while the next one is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plphp.cache import KVStore, RecallReport, allocated
from plphp.errors import UnsupportedModeError
from plphp.hf import compat
from plphp.hf.layer import PrunedLayer
from plphp.policy import CachePolicy, KeepPlan, LayerView, Policy, SequencePolicy, policy
from plphp.recall import Recall, as_recall, park


def checked(given: Recall | str | None, chosen: Policy, model: Any) -> tuple[Recall | None, Policy]:
    """What recall and which policy a model is attached with.

    A budget of 1 parks nothing: it is the policy that keeps everything.
    Raises UnsupportedModeError for a policy that ranks no cache, ValueError for bad options and for
    a budget that codes of this model's keys and values do not fit.
    """
    recall = as_recall(given)
    if recall is None:
        return None, chosen
    if isinstance(chosen, SequencePolicy) or not isinstance(chosen, CachePolicy):
        raise UnsupportedModeError(
            f"{type(chosen).__name__} does not rank what a cache holds, which recall needs: take a "
            "method that prunes the cache, or leave recall out"
        )
    least = recall.least_share(compat.head_dim(compat.text_config(model)), model.dtype.itemsize)
    if 0 < recall.budget < least:
        raise ValueError(
            f"budget must be at least {least:.3f} for home={recall.home!r}, the share of this "
            f"model's vision K/V that its codes take, got {recall.budget}: take fewer bits, "
            "home='host', or 0 to hold nothing in full"
        )
    return (None, policy("full")) if recall.budget == 1 else (recall, chosen)


def park_layer(layer: PrunedLayer, view: LayerView) -> KeepPlan:
    """Park a layer's vision tokens; returns what its store should be compacted to."""
    chosen, recall = layer.shared.policy, layer.shared.recall
    assert isinstance(chosen, CachePolicy) and isinstance(layer.store, KVStore)
    assert recall is not None
    if not bool((view.spans > 0).any()):
        return chosen.plan(view)
    among = layer.shared.prunable
    place = (among.index(view.layer), len(among))
    layer.parked = park(layer.store, chosen.look(view), recall, place)
    plan: KeepPlan = layer.parked.plan
    return plan


def recall_report(cache: Any) -> RecallReport | None:
    """What is where after a prompt; None where nothing is parked."""
    recall: Recall = cache.shared.recall
    found = [layer.parked for _, layer in cache.pruned_layers() if layer.parked is not None]
    if not found:
        return None
    parked = [x for home in found for x in home.parked()]
    every = parked + [x for home in found for x in home.tensors()]
    return RecallReport(
        home=recall.home,
        budget=recall.budget,
        full=sum(home.full for home in found),
        resident=sum(home.resident for home in found),
        device=sum(home.device for home in found),
        parked=allocated(parked),
        index=allocated(every) - allocated(parked),
        token_bytes=found[0].token_bytes,
        fetched=tuple(home.fetched for home in found),
    )


def recalled(cache: Any) -> list[list[Tensor]]:
    """Layer by layer and step by step since the last prompt, what every KV head read of the images.

    Each (B, Hkv, k) int64 on the CPU: row-logical positions of vision tokens, ascending, -1 pads.
    Empty without `Recall(record=True)`, and of layers that were left alone.
    """
    spans = cache.shared.spans
    if spans is None:
        return []
    spans = spans.cpu()
    vision = spans > 0
    order = vision.int().argsort(dim=-1, descending=True, stable=True)
    position = ((spans >= 0).cumsum(-1) - 1).masked_fill(~vision, -1).gather(1, order)
    position = torch.nn.functional.pad(position, (0, 1), value=-1)
    found = []
    for layer in cache.layers:
        home = getattr(layer, "parked", None)
        found.append([_positions(position, held) for held in (home.log if home else [])])
    return found


def _positions(position: Tensor, held: Tensor) -> Tensor:
    """held (B, Hkv, k): numbers of vision tokens, what is above all of them for none."""
    most = int((position >= 0).sum(-1).max())
    number = held.long().clamp(max=most)
    where = position[:, None].expand(-1, held.shape[1], -1).gather(2, number)
    where = where.masked_fill(number == most, position.shape[1])
    where = where.sort(-1).values
    return where.masked_fill(where == position.shape[1], -1)
