"""Recall in a cache: parks the tokens of a layer, and reports where they are and what was read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from torch import Tensor

from plphp.cache import KVStore, allocated
from plphp.errors import InputError, InputTypeError, UnsupportedModeError
from plphp.hf import compat
from plphp.hf.layer import PrunedLayer
from plphp.policy import (
    CachePolicy,
    KeepPlan,
    LayerView,
    Policy,
    cache_stage,
    in_stages,
    policy,
    sequence_stage,
)
from plphp.recall import HOMES, KeptBits, Recall, as_recall, park
from plphp.report import RecallReport

RATES = ("budget", "r", "delta_r")  # options of policies that say how many tokens are kept


def checked_recall(
    given: Recall | str | None, chosen: Policy, model: Any
) -> tuple[Recall | None, Policy]:
    """The recall and the policy that a model is attached with.

    given: as the caller gave it to `plphp.prune`
    chosen: the caller's policy. With a budget of 1 nothing is parked, so the result is no recall
        and the policy that keeps everything

    Raises UnsupportedModeError for a policy that does not prune the cache, InputTypeError for a
    wrong type, and InputError for bad options and for a budget below the size of the codes.
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
    if not isinstance(cache_stage(chosen), CachePolicy):
        raise UnsupportedModeError(
            f"{type(chosen).__name__} does not rank what a cache holds, which recall needs: use a "
            "method that prunes the cache, or leave recall out"
        )
    refuse_ignored(cache_stage(chosen))
    lowest = recall.least_share(compat.head_dim(compat.text_config(model)), model.dtype.itemsize)
    if 0 < recall.budget < lowest:
        raise InputError(
            f"the budget of recall {recall.home!r} must be at least {lowest:.3f}, the share of "
            f"this model's vision K/V that its codes take, got {recall.budget}: take fewer bits, "
            "'host', or 0 to hold nothing in full"
        )
    if recall.budget != 1:
        return recall, chosen
    first, full = sequence_stage(chosen), policy("full")
    return None, full if first is None else in_stages([first, full])


def refuse_ignored(chosen: Policy | None) -> None:
    """Raise UnsupportedModeError for options that say what an image keeps, which recall ignores.

    With recall a policy only ranks tokens: every image is stored in full by its size.
    """
    given = {
        "min_tokens": getattr(chosen, "min_tokens", 0) != 0,
        "round_to": getattr(chosen, "round_to", 1) != 1,
        "budget='global'": getattr(chosen, "budget", None) == "global",
    }
    ignored = [name for name, so in given.items() if so]
    if ignored:
        raise UnsupportedModeError(
            f"{' and '.join(ignored)} of {type(chosen).__name__} would have no effect, because "
            "recall decides by its own budget how many tokens of an image are stored in full: "
            "leave the option out, and set plphp.Recall(..., budget=...)"
        )


def ignored_rates(chosen: Policy | None) -> list[str]:
    """A remark on the rates of a policy that are not its defaults, since recall ignores them."""
    usual: dict[str, Any] = (
        {o.name: o.default for o in fields(chosen)} if is_dataclass(chosen) else {}
    )
    given = [name for name in RATES if name in usual and getattr(chosen, name) != usual[name]]
    if not given:
        return []
    return [
        f"{' and '.join(given)} of {type(chosen).__name__} had no effect: with recall a policy "
        "only ranks tokens, and the budget of plphp.Recall decides"
    ]


def checked_bits(bits: int | None, text: bool, recall: Recall | None) -> KeptBits | None:
    """The options of kept codes, as `plphp.prune` is given them.

    Raises UnsupportedModeError with recall, InputTypeError for a wrong type, and InputError for
    another number of bits.
    """
    if not isinstance(text, bool):
        raise InputTypeError(f"kv_text must be True or False, got {text!r}")
    if bits is None:
        if text:
            raise InputError("kv_text needs kv_bits: give kv_bits=4 or 2")
        return None
    if recall is not None:
        raise UnsupportedModeError(
            f"kv_bits stores what is kept in codes, and recall={recall.home!r} stores it in full: "
            "leave one of them out, or use recall='int4' alone"
        )
    return KeptBits(bits, text)


def park_layer(layer: PrunedLayer, view: LayerView, places: Tensor | None = None) -> KeepPlan:
    """Park the vision tokens of a layer. Returns the plan to which its store must be compacted.

    places: as in `Look`
    """
    chosen, recall = cache_stage(layer.shared.policy), layer.shared.recall
    assert isinstance(chosen, CachePolicy) and isinstance(layer.store, KVStore)
    assert recall is not None
    if not view.most_images():
        return chosen.plan(view)
    layers = layer.shared.prunable
    place = (layers.index(view.layer), len(layers))
    look = replace(chosen.look(view), places=places)
    layer.parked = home = park(layer.store, look, recall, place)
    plan, home.plan = home.plan, None
    assert plan is not None
    return plan


def recall_report(recall: Recall | None, layers: Sequence[Any]) -> RecallReport | None:
    """Where the vision tokens are after a prompt, in bytes. None if nothing is parked.

    layers: those of the cache
    """
    parts = (getattr(layer, "parked", None) for layer in layers)
    homes = [home for home in parts if home is not None]
    if recall is None or not homes:
        return None
    parked = [x for home in homes for x in home.parked()]
    tensors = parked + [x for home in homes for x in home.tensors()]
    return RecallReport(
        home=recall.home,
        budget=recall.budget,
        full=sum(home.full for home in homes),
        resident=sum(home.resident for home in homes),
        device=sum(home.device for home in homes),
        parked=allocated(parked),
        index=allocated(tensors) - allocated(parked),
        token_bytes=homes[0].token_bytes,
        where=homes[0].where,
        fetched=tuple(home.fetched for home in homes),
        read=tuple(recalled(layers)),
    )


def recalled(layers: Sequence[Any]) -> list[list[Tensor]]:
    """The vision tokens that each layer has read at each step since the last prompt.

    Returns one list a layer, with one tensor a decoded token: (B, Hkv, k) int64 on the CPU, the
    row-logical positions that each KV head read, ascending, filled up with -1. Decoded tokens that
    were removed again have no entry, and the rows are those that the cache has now. A list is empty
    without `Recall(record=True)`, and for a layer that was left alone.
    """
    homes = (getattr(layer, "parked", None) for layer in layers)
    return [[] if home is None else home.log for home in homes]
