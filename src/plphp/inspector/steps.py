"""The attention of each token of a pruned answer to kept and to dropped vision tokens.

The model reads the pruned answer again on the pruned cache and, if the oracle is asked, on the full
cache. The first token follows from the last prompt token, which attended to the whole prompt in
both cases; under a sequence method it attended to the tokens that the method had left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plphp.bench import Way
from plphp.bench.divergence import kl
from plphp.hf import PrunedCache, Pruning, prune
from plphp.hf.attention_probe import AttentionProbe, kept_and_dropped, kept_slots
from plphp.hf.shared_prefill import SharedPrefill, read_into
from plphp.inspector.data import Numbers, Steps
from plphp.inspector.reads import all_read, looks, masks
from plphp.policy import policy
from plphp.recall import HOMES
from plphp.report import Report, Seen

Groups = Mapping[int, Tensor]
READ_BYTES = 2_000_000  # for the masks of what recall read, so that a page stays below 5 MB


def steps_of(
    model: Any,
    inputs: Mapping[str, Tensor],
    way: Way,
    prompt: SharedPrefill,
    tokens: Tensor,
    decode: Callable[[Tensor], str] | None = None,
    byte_limit: int = READ_BYTES,
) -> Steps:
    """The attention of an answer's tokens to the kept vision tokens.

    way: as for the answer
    prompt: the unpruned prefill of `inputs`; tokens: (T,) int64, the answer of the pruned model
    decode: the text of tokens; with it, the full model reads the answer too
    byte_limit: bytes that the masks of what recall read may take
    """
    (way, chooses), recall = _recording(way), way.recall
    # Several tokens at once are a prompt, for which parked tokens and codes are in the store.
    parts = 1 if recall is None and way.kv_bits is None else len(tokens) - 1
    with torch.inference_mode():
        with way.attach(model) as pruning:
            assert pruning is not None
            cache, first = _begun(pruning, inputs, prompt)
            report, seen = cache.report, prompt.seen
            assert report is not None and seen is not None
            groups = {a.layer: kept_slots(a, seen) for a in report.layers if a.kept.shape[1]}
            pruned, attention = _read(model, cache, tokens, [groups] * parts, parts)
            log = cache.recalled()
        if recall is not None and not chooses:
            report = all_read(report, seen)
        begin, depth = _first(prompt, report, seen), len(report.layers)
        same = {i: m for i, m in begin.items() if report.entered(i) is None}
        read = masks(log, seen, byte_limit)
        own = Steps(_numbers(same, attention, depth, 0), fetched=_fetched(report), read=read)
        if decode is None:
            return own
        with prune(model, policy("full")):
            whole = looks(report, seen, log, parts)
            full, attention = _read(model, prompt.cache, tokens, whole, parts)
            prompt.cache.crop(-(len(tokens) - 1))
        full, pruned = (torch.cat([f, x]) for f, x in ((prompt.logits, full), (first, pruned)))
        divergence = kl(*(x.float().log_softmax(-1) for x in (full, pruned)))
    return replace(
        own,
        full_kept=_numbers(begin, attention, depth, 0),
        lost=_numbers(begin, attention, depth, 1),
        gone=_numbers(begin, attention, depth, 2) if report.stages else (),
        said=tuple(decode(token[None]) for token in full.argmax(-1)),
        kl=tuple(round(float(value), 4) for value in divergence),
    )


def _recording(way: Way) -> tuple[Way, bool]:
    """The way with a log of what recall reads, and whether its home has one: whether it chooses."""
    recall = way.recall
    if recall is None or "record" not in HOMES[recall.home].options:
        return way, False
    return replace(way, recall=replace(recall, record=True)), True


def _begun(
    pruning: Pruning, inputs: Mapping[str, Tensor], prompt: SharedPrefill
) -> tuple[PrunedCache, Tensor]:
    """The cache of the pruned prompt, from the shared prefill if the policy allows, and logits."""
    if pruning.policy.prunes_cache:
        return prompt.pruned(pruning), prompt.logits
    cache = PrunedCache(pruning.model)
    return cache, read_into(cache, pruning.model, inputs).logits


def _read(
    model: Any, cache: PrunedCache, tokens: Tensor, groups: Iterable[Groups], parts: int
) -> tuple[Tensor, dict[int, Tensor]]:
    """Logits (T-1, vocabulary) after each token except the last, and their attention to groups.

    parts: in how many forwards the tokens are read, one or T-1
    groups: for each part, layer -> groups of tokens
    """
    watch, logits = AttentionProbe({}), []
    ids = tokens[None, :-1].to(model.device)
    if not ids.numel():
        return torch.empty(0, model.config.get_text_config().vocab_size), {}
    cache.shared.watch = watch
    try:
        for part, watch.groups in zip(ids.tensor_split(parts, 1), groups, strict=True):
            logits.append(model(input_ids=part, cache=cache).logits[0])
    finally:
        cache.shared.watch = None
    return torch.cat(logits), watch.seen


def _fetched(report: Report) -> tuple[int, ...]:
    """How many tokens all layers and KV heads fetched for each token; 0 for the first."""
    found = () if report.recall is None else report.recall.fetched
    return (0, *map(sum, zip(*found, strict=True))) if any(found) else ()


def _first(prompt: SharedPrefill, report: Report, seen: Seen) -> dict[int, Tensor]:
    """Layer -> (3, 1): the last prompt token's attention, in the full model, to the groups of
    `kept_and_dropped`."""
    found = {}
    for index, view in prompt.views.items():
        layer = report.layers[index]
        groups = kept_and_dropped(layer, seen, report.entered(index)).to(view.probs)
        probs = view.probs[0].view(view.kv_heads, -1, view.probs.shape[-1])
        mass = torch.einsum("hgs,nhs->n", probs, groups) / view.probs.shape[1]
        found[index] = mass[:, None].cpu()
    return found


def _numbers(
    first: Mapping[int, Tensor], then: Mapping[int, Tensor], depth: int, group: int
) -> tuple[Numbers, ...]:
    """The attention to one group: for each token a tuple with one number per layer."""
    layers: list[list[float | None]] = []
    length = 1 + max((m.shape[1] for m in then.values()), default=0)
    for index in range(depth):
        begin = first[index][group].tolist() if index in first else [None]
        rest = then[index][group].tolist() if index in then else [None] * (length - 1)
        layers.append([None if v is None else round(v, 4) for v in (*begin, *rest)])
    return tuple(zip(*layers, strict=True))
