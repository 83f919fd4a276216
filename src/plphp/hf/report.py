"""From what a prompt's layers kept to the report that a user reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from plphp.cache import allocated
from plphp.hf import stock
from plphp.hf.cache import PrunedCache, layer_tensors
from plphp.hf.layer import PrunedLayer
from plphp.hf.prompt import Prefill
from plphp.hf.recall import recall_report
from plphp.models import processor_inputs
from plphp.policy import SequencePolicy
from plphp.recall import HOMES, Recall
from plphp.report import (
    EarlierImage,
    LayerReport,
    Report,
    Seen,
    images_left,
    images_of,
    in_rows,
    layer_report,
    told,
    untouched_report,
)


def build_report(cache: PrunedCache, prefill: Prefill) -> Report:
    """The report of a finished prefill; what it tells is on the CPU."""
    where, recall = prefill.where, cache.shared.recall
    counts = where.spans.cpu()
    earlier = images_found(cache) if prefill.prompt.begin else ()
    lost = [told(earlier, _rounds(recall))] if earlier else []
    layers = tuple(_layer(cache, prefill, index) for index in range(_depth(cache)))
    return Report(
        layers=layers,
        kv_bytes=cache.kv_bytes(),
        kv_bytes_full=sum(layer.kv_bytes_full for layer in layers),
        prompt=tuple((counts >= 0).sum(-1).tolist()),
        images=tuple(counts.amax(-1).clamp(min=0).tolist()),
        notes=(*where.notes, *_notes(cache, prefill), *lost),
        seen=_seen(prefill, counts),
        recall=recall_report(cache),
        earlier=earlier,
    )


def _rounds(recall: Recall | None) -> str | None:
    """The name of a home that parks rounded numbers, None for others."""
    return None if recall is None or HOMES[recall.home].exact else recall.home


def images_found(cache: PrunedCache) -> tuple[EarlierImage, ...]:
    """The images of all turns so far, as the next prompt finds them."""
    if cache.shared.recall is not None and cache.shared.spans is not None:
        return images_of(cache.shared.spans.cpu())
    found, report = cache._found, cache.report
    if report is not None:
        assert report.seen is not None
        found = images_left(report.seen, report.layers, report.earlier)
    return found if cache._order is None else in_rows(found, cache._order.tolist())


def _layer(cache: PrunedCache, prefill: Prefill, index: int) -> LayerReport:
    report = _kept(cache, prefill, index)
    if index >= len(cache.layers):
        return report
    layer = cache.layers[index]
    held, full = allocated(layer_tensors(layer)), _full_bytes(layer, prefill.prompt.end)
    return replace(report, kv_bytes=held, kv_bytes_full=full)


def _seen(prefill: Prefill, spans: Tensor) -> Seen:
    """What is drawn of a prompt later. Pixels are left out: a report may be kept for long."""
    source = prefill.prompt.source
    given = processor_inputs(source).items()
    small = {name: t for name, t in given if isinstance(t, Tensor) and t.dim() <= 2}
    ids = source.get("input_ids")
    ids = None if ids is None else ids[:, -spans.shape[1] :]
    return Seen(spans, prefill.where.positions().cpu(), prefill.prompt.config, small, ids)


def _kept(cache: PrunedCache, prefill: Prefill, index: int) -> LayerReport:
    if index in prefill.plans:
        return layer_report(index, *prefill.plans[index])
    pair = _pair(cache.layers[index]) if index < len(cache.layers) else []
    kv_heads = pair[0].shape[1] if pair else 0  # such as a linear layer: it has no entries
    return untouched_report(index, prefill.where.spans, prefill.where.positions(), kv_heads)


def _depth(cache: PrunedCache) -> int:
    """Decoder layers; up to 5.19 those that share other layers' keys are none of the cache's."""
    return max(len(cache.layers), getattr(cache.config, "num_hidden_layers", 0))


def _pair(layer: Any) -> list[Tensor]:
    """Keys and values (B, Hkv, slots, D) of a layer, none where it holds no such thing."""
    owner = layer.store if isinstance(layer, PrunedLayer) else layer
    pair = [getattr(owner, name, None) for name in ("keys", "values")]
    return [tensor for tensor in pair if isinstance(tensor, Tensor)]


def _full_bytes(layer: Any, seen: int) -> int:
    """Bytes that transformers' own cache takes: what was dropped here included, and no slack."""
    if not isinstance(layer, PrunedLayer):
        return stock.content_bytes(layer)
    if layer.window is not None:  # transformers keeps what the next token can see
        seen = min(seen, max(layer.window - 1, 1))
    total = 0
    for tensor in _pair(layer):
        batch, heads, _, dim = tensor.shape
        total += batch * heads * seen * dim * tensor.element_size()
    return total


def _notes(cache: PrunedCache, prefill: Prefill) -> list[str]:
    notes, policy = [], cache.shared.policy
    if prefill.where.images <= 0:
        notes.append("nothing was pruned: the prompt has no vision tokens")
    pruned = {index for index, _ in cache.pruned_layers()}
    alone = [index for index in range(_depth(cache)) if index not in pruned]
    if policy.kind == "layers" and cache.shared.recall is None:
        notes.append("planned after the last layer: until then the whole prompt was held")
    if prefill.remaining is not None and isinstance(policy, SequencePolicy):
        at = policy.leave_at(len(cache.layers))
        notes.append(f"tokens left before layer {at}: earlier layers hold them all")
    if alone:
        why = (
            "their attention window does not cover the prompt, other layers share their keys and "
            "values, or they hold no ordinary KV cache"
        )
        notes.append(f"layers left alone: {', '.join(map(str, alone))} ({why})")
    return notes
