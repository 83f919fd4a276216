"""Builds the `Report` of a prompt from the plans and the stores of its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from plphp.cache import allocated
from plphp.hf import stock
from plphp.hf.conversation import Conversation
from plphp.hf.layer import PrunedLayer, layer_tensors
from plphp.hf.prompt import Prefill
from plphp.hf.recall import ignored_rates, recall_report
from plphp.hf.token_types import types_note
from plphp.models import processor_inputs
from plphp.policy import PLPHP, Policy, cache_stage, sequence_stage
from plphp.recall import HOMES, Recall
from plphp.report import (
    CodesReport,
    EarlierImage,
    LayerReport,
    Report,
    Seen,
    StageReport,
    earlier_images_note,
    images_left,
    images_of,
    in_rows,
    layer_report,
    left_aligned,
    one_class_note,
    ratio,
    undefined_note,
    untouched_report,
)

NO_IMAGE = "nothing was pruned: the prompt has no vision tokens"
NO_NEW_IMAGE = (
    "nothing was pruned: this turn brings no image, and the vision tokens that earlier turns kept "
    "stay as they are"
)
PLANNED_LAST = (
    "the layers were planned together after the last one, so that the cache held the whole prompt "
    "until then"
)
WRONG_SIDE = "so its answer follows padding: pad on the left (padding_side='left')"


def build_report(cache: Conversation, prefill: Prefill) -> Report:
    """The report of a finished prefill. Its tensors are on the CPU."""
    where, recall = prefill.where, cache.shared.recall
    spans = where.spans.cpu()
    earlier = images_found(cache) if prefill.prompt.begin else ()
    lost = [earlier_images_note(earlier, _rounding_home(recall))] if earlier else []
    layers = tuple(_layer(cache, prefill, index) for index in range(_depth(cache)))
    undefined = tuple(index for index, found in sorted(prefill.undefined.items()) if bool(found))
    return Report(
        layers=layers,
        kv_bytes=cache.kv_bytes(),
        kv_bytes_full=sum(layer.kv_bytes_full for layer in layers),
        prompt=tuple((spans >= 0).sum(-1).tolist()),
        images=tuple(spans.amax(-1).clamp(min=0).tolist()),
        notes=(
            *undefined_note(undefined),
            *where.notes,
            *_right_padding(spans),
            *_notes(cache, prefill, earlier),
            *([] if undefined else _one_class(cache, layers)),
            *_rounded_away(cache, layers),
            *lost,
        ),
        seen=_seen(prefill, spans),
        recall=recall_report(cache.shared.recall, cache.layers),
        earlier=earlier,
        stages=stage_reports(cache.shared.policy, prefill, layers),
        codes=codes_report(cache, layers),
        undefined=undefined,
    )


def _right_padding(spans: Tensor) -> list[str]:
    """A note if a row of the prompt ends with padding. spans: (B, N) int64 on the CPU"""
    rows = (spans[:, -1] < 0).nonzero()[:, 0].tolist()
    which = f"row {rows[0]} is" if len(rows) == 1 else f"rows {', '.join(map(str, rows))} are"
    return [f"{which} padded on the right, {WRONG_SIDE}"] if rows else []


def _one_class(cache: Conversation, layers: tuple[LayerReport, ...]) -> list[str]:
    """A note if the thresholds put all layers into one class, where the rates depend on classes."""
    policy = cache_stage(cache.shared.policy)
    chosen_by_class = isinstance(policy, PLPHP) and policy.delta_r > 0
    return one_class_note(layers) if chosen_by_class and cache.shared.recall is None else []


def _rounded_away(cache: Conversation, layers: tuple[LayerReport, ...]) -> list[str]:
    """A note if `round_to` made layers keep every token, whose rates would drop some."""
    step = getattr(cache_stage(cache.shared.policy), "round_to", 1)
    if step == 1 or cache.shared.recall is not None:
        return []
    asked = [layer for layer in layers if layer.pruned and min(layer.rate) < 1]
    whole = [layer for layer in asked if layer.kept.shape[-1] and layer.retention == 1]
    if not whole:
        return []
    which = "all pruned layers" if len(whole) == len(asked) else f"{len(whole)} layers"
    return [f"{which} kept everything: they would drop fewer tokens of a row than round_to={step}"]


def stage_reports(
    policy: Policy, prefill: Prefill, layers: tuple[LayerReport, ...]
) -> tuple[StageReport, ...]:
    """What each stage of a policy left; empty where no hidden states were dropped."""
    first, second = sequence_stage(policy), cache_stage(policy)
    if first is None or prefill.remaining is None:
        return ()
    columns = prefill.prompt.length
    all_tokens = int((prefill.where.spans[:, -columns:] > 0).sum())
    where, at = prefill.remaining.where, first.leave_at(len(layers))
    left = int((where.spans > 0).sum())
    stays = where.positions().masked_fill(where.spans <= 0, -1).cpu()
    share = ratio(left, all_tokens)
    stages = [StageReport(type(first).__name__, at, share, left_aligned(stays[:, None])[:, 0])]
    if second is not None:
        entered = sum(
            layer.kept.shape[1] * (all_tokens if layer.layer < at else left) for layer in layers
        )
        kept = sum(int((layer.kept >= 0).sum()) for layer in layers)
        stages.append(StageReport(type(second).__name__, None, ratio(kept, entered)))
    return tuple(stages)


def codes_report(cache: Conversation, layers: tuple[LayerReport, ...]) -> CodesReport | None:
    """The bytes of the vision tokens of a prompt where kept tokens are in codes, else None."""
    kept, full, device = cache.shared.kept, 0, 0
    if kept is None:
        return None
    for report in layers[: len(cache.layers)]:
        layer = cache.layers[report.layer]
        pair = _pair(layer)
        if not pair:
            continue
        unit = sum(x.shape[-1] * x.element_size() for x in pair)
        tokens = (report.kept >= 0).sum(-1)
        full += sum(report.vision) * report.kept.shape[1] * unit
        in_codes = report.layer in cache.shared.prunable
        dims = pair[0].shape[-1], pair[1].shape[-1]
        device += kept.device_bytes(tokens, dims) if in_codes else int(tokens.sum()) * unit
    return CodesReport(kept.bits, kept.text, full, device)


def _rounding_home(recall: Recall | None) -> str | None:
    """The name of a home that parks rounded numbers, None for others."""
    return None if recall is None or HOMES[recall.home].exact else recall.home


def images_found(cache: Conversation) -> tuple[EarlierImage, ...]:
    """The images of all turns so far, with the share of each that the next prompt finds."""
    if cache.shared.recall is not None and cache.shared.spans is not None:
        masks = [layer.entered for _, layer in cache.pruned_layers()]
        entered = [None if mask is None else mask.cpu() for mask in masks]
        return images_of(cache.shared.spans.cpu(), entered)
    images, report = cache._found, cache.report
    if report is not None:
        assert report.seen is not None
        images = images_left(report.seen, report.layers, report.earlier)
    return images if cache._order is None else in_rows(images, cache._order.tolist())


def _layer(cache: Conversation, prefill: Prefill, index: int) -> LayerReport:
    """The report of one layer, with its bytes."""
    report = _kept(cache, prefill, index)
    if index >= len(cache.layers):
        return report
    layer = cache.layers[index]
    kv_bytes, full = allocated(layer_tensors(layer)), _full_bytes(layer, prefill.prompt.end)
    return replace(report, kv_bytes=kv_bytes, kv_bytes_full=full)


def _seen(prefill: Prefill, spans: Tensor) -> Seen:
    """What the inspector needs to draw a prompt. Pixels are left out to save memory.

    spans: (B, N) int64 on the CPU
    """
    source = prefill.prompt.source
    inputs = processor_inputs(source).items()
    small = {name: t for name, t in inputs if isinstance(t, Tensor) and t.dim() <= 2}
    ids = source.get("input_ids")
    ids = None if ids is None else ids[:, -spans.shape[1] :]
    return Seen(spans, prefill.where.positions().cpu(), prefill.prompt.config, small, ids)


def _kept(cache: Conversation, prefill: Prefill, index: int) -> LayerReport:
    """What one layer kept, without its bytes."""
    if index in prefill.plans:
        vision = tuple((prefill.where.spans > 0).sum(-1).tolist())
        return layer_report(index, *prefill.plans[index], vision)
    pair = _pair(cache.layers[index]) if index < len(cache.layers) else []
    kv_heads = pair[0].shape[1] if pair else 0  # 0 for a layer without keys, such as a linear one
    return untouched_report(index, prefill.where.spans, prefill.where.positions(), kv_heads)


def _depth(cache: Conversation) -> int:
    """Number of decoder layers. The cache may have fewer.

    Up to transformers 5.19 a cache has no layer for those that use the keys of another layer.
    """
    return max(len(cache.layers), getattr(cache.config, "num_hidden_layers", 0))


def _pair(layer: Any) -> list[Tensor]:
    """Keys and values (B, Hkv, slots, D) of a layer, an empty list if it has none."""
    holder = layer.store if isinstance(layer, PrunedLayer) else layer
    pair = [getattr(holder, name, None) for name in ("keys", "values")]
    return [tensor for tensor in pair if isinstance(tensor, Tensor)]


def _full_bytes(layer: Any, columns: int) -> int:
    """Bytes that transformers' own cache would take: with dropped columns and without slack.

    columns: how many the layer has seen
    """
    if not isinstance(layer, PrunedLayer):
        return stock.content_bytes(layer)
    if layer.window is not None:  # transformers keeps only what the next token attends to
        columns = min(columns, max(layer.window - 1, 1))
    total = 0
    for tensor in _pair(layer):
        batch, heads, _, dim = tensor.shape
        total += batch * heads * columns * dim * tensor.element_size()
    return total


def _notes(cache: Conversation, prefill: Prefill, earlier: tuple[EarlierImage, ...]) -> list[str]:
    """Remarks on the layers and the policy. earlier: the images of earlier turns"""
    notes, policy = [], cache.shared.policy
    first, second = sequence_stage(policy), cache_stage(policy)
    if prefill.where.images <= 0:
        notes.append(NO_NEW_IMAGE if any(e.tokens for e in earlier) else NO_IMAGE)
    notes += types_note(cache._model(), prefill.prompt.source, prefill.prompt.begin)
    notes += ignored_rates(second) if cache.shared.recall is not None else []
    pruned = {index for index, _ in cache.pruned_layers()}
    alone = [index for index in range(_depth(cache)) if index not in pruned]
    if second is not None and second.kind == "layers" and cache.shared.recall is None:
        notes.append(PLANNED_LAST)
    if prefill.remaining is not None and first is not None and first.leave_at(_depth(cache)) > 0:
        at = first.leave_at(_depth(cache))
        notes.append(f"tokens left before layer {at}: earlier layers hold them all")
    if alone:
        why = (
            "their attention window does not cover the prompt, other layers share their keys and "
            "values, or they hold no ordinary KV cache"
        )
        notes.append(f"layers left alone: {', '.join(map(str, alone))} ({why})")
    return notes
