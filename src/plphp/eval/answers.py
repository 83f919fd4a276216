"""Answers of a batch: the unpruned model's, and what is left of them after pruning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from plphp.cache import Report
from plphp.eval.batches import TEXT, Batch
from plphp.hf import PrunedCache, compat, prune
from plphp.hf.shared_prefill import SharedPrefill, read_into
from plphp.policy import Policy
from plphp.recall import Recall

GREEDY = {"do_sample": False, "num_beams": 1}


@dataclass(frozen=True)
class Reference:
    """What the untouched model answers, and how sure it is of every token.

    tokens: (B, T) int64, up to the longest answer of the batch
    lengths: (B,) tokens of each answer, its end token included
    logits: (B, T, vocabulary), what each token was chosen from
    kv_bytes: of keys and values of the whole batch's prompt
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    logits: Tensor
    kv_bytes: int


@dataclass(frozen=True)
class Answers:
    """What a pruned model answers.

    tokens: (B, T') int64, its own
    kl: KL(full || pruned) in nats of every token of the reference's answer, one list a row
    agree: whether both would have said the same token there, one list a row
    kept: (B,) vision K/V entries kept, over those of the full prompt; with recall the device bytes
        of vision tokens over the full ones, the same for all rows
    kv_bytes: allocated for the whole batch after the prompt
    """

    tokens: Tensor
    kl: tuple[tuple[float, ...], ...]
    agree: tuple[tuple[bool, ...], ...]
    kept: tuple[float, ...]
    kv_bytes: int


def refer(model: Any, batch: Batch) -> Reference:
    """Generate with the untouched model, which must not be attached."""
    cache = DynamicCache(config=compat.text_config(model))
    tokens, logits = _generate(model, cache, batch.inputs, batch.limit)
    pairs = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    held = [t[..., : batch.columns, :] for t in pairs if isinstance(t, Tensor)]
    return Reference(
        tokens=tokens,
        lengths=answer_lengths(tokens, end_tokens(model)),
        logits=torch.stack(logits, 1).float(),
        kv_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held),
    )


def answer(
    model: Any,
    policy: Policy,
    batch: Batch,
    reference: Reference,
    prompt: SharedPrefill,
    recall: Recall | None = None,
) -> Answers:
    """Generate pruned, then read the reference's answer on what the same prompt left.

    prompt: of `batch.prompt`, read once for all methods that prune the cache; those that change
        the prompt's own forward read it themselves
    One prefill serves both: the cache is cropped back to it. Raises what `plphp.prune` raises.
    """
    with prune(model, policy, recall=recall) as pruning:
        if policy.prunes_cache:
            cache = prompt.pruned(pruning)
        else:
            cache = PrunedCache(model)
            prompt = read_into(cache, model, batch.prompt)
        report = cache.report
        assert report is not None, "a finished prompt leaves a report"
        if batch.first is None:
            go_on = _go_on if recall is None else walk
            tokens, first = go_on(model, cache, batch, prompt), prompt.logits
        else:
            _crop(cache, batch.shared)
            tokens, (first, *_) = _generate(model, cache, batch.later(), batch.limit)
        logits = [first[:, None].float()]
        if reference.tokens.shape[1] > 1:
            _crop(cache, batch.columns)
            given = reference.tokens[:, :-1]
            logits.append(_read(model, cache, batch, given, 1 if recall else given.shape[1]))
    kl, agree = compare(reference, torch.cat(logits, 1))
    return Answers(
        tokens=tokens,
        kl=kl,
        agree=agree,
        kept=kept_shares(report, batch.vision),
        kv_bytes=report.kv_bytes,
    )


def _generate(
    model: Any, cache: Cache, inputs: Mapping[str, Tensor], limit: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """New tokens (B, T) and the logits (B, vocabulary) that each was chosen from."""
    out = model.generate(
        **inputs,
        **{compat.CACHE: cache},
        max_new_tokens=limit,
        output_logits=True,
        return_dict_in_generate=True,
        **GREEDY,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], out.logits


def _go_on(model: Any, cache: PrunedCache, batch: Batch, prompt: SharedPrefill) -> Tensor:
    """The answer (B, T) from its first token on, which the prompt has given already."""
    if batch.limit == 1:
        return prompt.first
    ids, mask = (batch.inputs[name] for name in TEXT)
    inputs = {
        "input_ids": torch.cat([ids, prompt.first], 1),
        "attention_mask": torch.cat([mask, mask.new_ones(prompt.first.shape)], 1),
    }
    rest, _ = _generate(model, cache, inputs, batch.limit - 1)
    # An answer that ends with its first token does not go on, which generate() cannot know here.
    ended = torch.isin(prompt.first.cpu(), end_tokens(model)).to(rest.device)
    return torch.cat([prompt.first, torch.where(ended, prompt.first, rest)], 1)


def walk(model: Any, cache: PrunedCache, batch: Batch, prompt: SharedPrefill) -> Tensor:
    """As `_go_on`, one forward a token: to generate() the first token would be a turn of its own.

    A turn's tokens see the whole conversation, which recall's later tokens do not.
    """
    tokens, mask = [prompt.first], batch.inputs["attention_mask"]
    ends = end_tokens(model).to(prompt.first.device)
    over = torch.isin(prompt.first, ends)
    while len(tokens) < batch.limit and not bool(over.all()):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        out = model(input_ids=tokens[-1], attention_mask=mask, cache=cache)
        new = out.logits[:, -1:].argmax(-1)
        tokens.append(torch.where(over, tokens[-1], new))
        over = over | torch.isin(new, ends)
    return torch.cat(tokens, 1)


def _read(model: Any, cache: PrunedCache, batch: Batch, tokens: Tensor, at_once: int) -> Tensor:
    """Logits (B, T, vocabulary) after each of some given tokens (B, T), which follow the prompt.

    at_once: columns a forward
    """
    mask, logits = batch.inputs["attention_mask"], []
    for part in torch.split(tokens, at_once, 1):
        mask = torch.cat([mask, mask.new_ones(part.shape)], 1)
        out = model(input_ids=part, attention_mask=mask, cache=cache)
        logits.append(out.logits.float())
    return torch.cat(logits, 1)


def compare(reference: Reference, logits: Tensor) -> tuple[Any, Any]:
    """KL(full || pruned) and top-1 agreement, per row and token of its answer.

    logits: (B, T, vocabulary) float32 of the pruned model at the tokens of the reference
    """
    full = reference.logits.log_softmax(-1)
    pruned = logits.to(full.device).log_softmax(-1)
    # Rounding may leave a sum of -1e-9 where both are equal.
    kl = (full.exp() * (full - pruned)).sum(-1).clamp(min=0)
    agree = full.argmax(-1) == pruned.argmax(-1)
    lengths = reference.lengths
    return (
        tuple(tuple(row[:n]) for row, n in zip(kl.tolist(), lengths, strict=True)),
        tuple(tuple(row[:n]) for row, n in zip(agree.tolist(), lengths, strict=True)),
    )


def end_tokens(model: Any) -> Tensor:
    """int64, on the CPU: the tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return torch.tensor([] if end is None else [end] if isinstance(end, int) else end).long()


def answer_lengths(tokens: Tensor, ends: Tensor) -> tuple[int, ...]:
    """Tokens of each row of (B, T) up to its first end token, which counts."""
    over = torch.isin(tokens.cpu(), ends)
    steps = over.shape[1]
    first = over.int().argmax(-1) + 1
    return tuple(torch.where(over.any(-1), first, steps).tolist())


def kept_shares(report: Report, vision: tuple[int, ...]) -> tuple[float, ...]:
    """What is kept of the vision K/V of each row, as `Answers` has it."""
    if report.recall is not None:
        return (report.recall.share,) * len(vision)
    layers = [layer for layer in report.layers if layer.kept.shape[1]]
    shares = []
    for row, tokens in enumerate(vision):
        kept = sum(int((layer.kept[row] >= 0).sum()) for layer in layers)
        whole = sum(tokens * layer.kept.shape[1] for layer in layers)
        shares.append(kept / whole if whole else 1.0)
    return tuple(shares)


def _crop(cache: PrunedCache, columns: int) -> None:
    """Forget what came after the first columns."""
    more = int(cache.get_seq_length()) - columns
    if more:
        cache.crop(-more)
