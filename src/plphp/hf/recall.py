"""Recall inside a cache: parked when a prompt has been read, whole again while the next one is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plphp.cache import KVStore, allocated
from plphp.errors import InputTypeError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.layer import PrunedLayer
from plphp.policy import CachePolicy, KeepPlan, LayerView, Policy, policy
from plphp.recall import HOMES, Recall, as_recall, park
from plphp.report import RecallReport


def checked(given: Recall | str | None, chosen: Policy, model: Any) -> tuple[Recall | None, Policy]:
    """What recall and which policy a model is attached with.

    A budget of 1 parks nothing: it is the policy that keeps everything.
    Raises UnsupportedModeError for a policy that ranks no cache, ValueError for bad options and for
    a budget that codes of this model's keys and values do not fit.
    """
    if isinstance(given, type) and issubclass(given, Recall):
        given = given()
    if given is not None and not isinstance(given, Recall | str):
        raise InputTypeError(
            f"recall must be a plphp.Recall, the name of its home ({', '.join(HOMES)}) or None, "
            f"got {given!r}"
        )
    recall = as_recall(given)
    if recall is None:
        return None, chosen
    if not isinstance(chosen, CachePolicy):
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
    if not view.most_images():
        return chosen.plan(view)
    among = layer.shared.prunable
    place = (among.index(view.layer), len(among))
    layer.parked = home = park(layer.store, chosen.look(view), recall, place)
    plan, home.plan = home.plan, None
    assert plan is not None
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
        where=found[0].where,
        fetched=tuple(home.fetched for home in found),
        read=tuple(recalled(cache)),
    )


def recalled(cache: Any) -> list[list[Tensor]]:
    """Layer by layer and token by token since the last prompt, what every KV head read of images.

    Each (B, Hkv, k) int64 on the CPU: row-logical positions of vision tokens, ascending, -1 pads.
    Tokens that were taken back are left out, and rows are those that the cache has now. Empty
    without `Recall(record=True)`, and of layers that were left alone.
    """
    homes = (getattr(layer, "parked", None) for layer in cache.layers)
    return [[] if home is None else home.log for home in homes]
