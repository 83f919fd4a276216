"""Two alternatives to dropping at once: choose after some words of the answer, or round the rest.

    python dev/studies/late_or_small.py --limit 48 --tasks describe,long

after m      the prompt and the first m tokens of the full model's answer are read together, and
             SnapKV with a window of those m tokens prunes the images: a choice by what the answer
             looks at
rest in b    a method's choice stays in full, all other vision tokens are rounded to b bits (keys
             per channel, values per token); "all" rounds every vision token

A simulation of bytes: nothing is packed. The findings are in docs/accuracy/findings.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.eval.answers import end_tokens
from plphp.eval.batches import Batch, in_batches, make_batch
from plphp.eval.tasks import TASKS
from plphp.hf.shared_prefill import SharedPrefill, read
from plphp.inputs import load

SEED, BATCH = 8, 24


def go_on(model: Any, inputs: dict[str, Tensor], cache: Any, first: Tensor, limit: int) -> Tensor:
    """Tokens (B, T) from `first` on, of a cache that holds the prompt of `inputs`."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(first)], 1)
    ids = torch.cat([inputs["input_ids"], first], 1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=limit,
        do_sample=False,
    )
    return torch.cat([first, out[:, ids.shape[1] :]], 1)


def with_answer(batch: Batch, tokens: Tensor) -> dict[str, Tensor]:
    """The prompt with some tokens of an answer behind it."""
    more = {"input_ids": tokens, "attention_mask": 1, "mm_token_type_ids": 0}
    inputs = dict(batch.inputs)
    for name, value in more.items():
        before = inputs[name]
        added = value if isinstance(value, Tensor) else torch.full_like(tokens, value)
        inputs[name] = torch.cat([before, added.to(before.dtype)], 1)
    return inputs


def rounded(x: Tensor, bits: int, dim: int) -> Tensor:
    """To 2**bits levels between the extremes along a dimension."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = (high - low).clamp(min=1e-8) / (2**bits - 1)
    return ((x - low) / step).round() * step + low


def shrink_rest(cache: Any, prompt: SharedPrefill, chosen: Any, bits: int) -> None:
    """Round every vision token that a policy would drop; without a policy every one."""
    for index, layer in cache.pruned_layers():
        view, store = prompt.views[index], layer.store
        keep = torch.zeros(*store.keys.shape[:2], view.spans.shape[1], dtype=torch.bool)
        if chosen is not None:
            plan = chosen.plan(view)
            slots = torch.arange(plan.columns.shape[-1])
            used = slots >= len(slots) - plan.lengths[:, None]
            keep.scatter_(2, plan.columns, used[:, None].expand_as(plan.columns))
        for row, spans in enumerate(view.spans):
            columns = (spans >= 0).nonzero()[:, 0]  # the store has dropped the padding
            own = slice(store.end - len(columns), store.end)
            vision = spans[columns] > 0
            drop = (vision & ~keep[row][:, columns])[..., None]
            keys, values = store.keys[row, :, own], store.values[row, :, own]
            small = keys.clone()
            small[:, vision] = rounded(keys[:, vision], bits, 1)
            store.keys[row, :, own] = torch.where(drop, small, keys)
            store.values[row, :, own] = torch.where(drop, rounded(values, bits, 2), values)


def answers(model: Any, batch: Batch, budget: float) -> Iterator[tuple[str, Tensor]]:
    """Every variant's name and tokens for one batch."""
    prompt = read(model, batch.inputs)
    with plphp.prune(model, plphp.policy("full")) as pruning:
        full = go_on(model, batch.inputs, prompt.pruned(pruning), prompt.first, batch.limit - 1)
        yield "full", full
        for bits in (4, 3, 2):
            for name in ("plphp-flat", "novelty", None):
                chosen = plphp.policy(name, budget=budget) if name else None
                cache = prompt.pruned(pruning)
                shrink_rest(cache, prompt, chosen, bits)
                left = go_on(model, batch.inputs, cache, prompt.first, batch.limit - 1)
                yield f"{name or 'all'}, rest in {bits} bits", left
    for m in (1, 2, 4, 8):
        inputs = with_answer(batch, full[:, :m])
        later = read(model, inputs, window=m)
        policy = plphp.policy("snapkv", budget=budget, window=m, kernel=1)
        with plphp.prune(model, policy) as pruning:
            left = go_on(model, inputs, later.pruned(pruning), later.first, batch.limit)
        yield f"chosen after {m}", torch.cat([full[:, :m], left], 1)


def text(embedded: Any, row: Tensor) -> str:
    ends = torch.isin(row, end_tokens(embedded.model)).nonzero()
    return str(embedded.decode(row[: int(ends[0])] if len(ends) else row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--tasks", default="describe,long")
    parser.add_argument("--budget", type=float, default=0.2)
    options = parser.parse_args()
    embedded = load("embedded", "float32", "cpu")
    for name in options.tasks.split(","):
        right: dict[str, int] = defaultdict(int)
        for rows in in_batches(TASKS[name].draw(options.limit, SEED), BATCH, embedded.tokenizer):
            batch = make_batch(embedded, rows, 128)
            with torch.inference_mode():
                for variant, tokens in answers(embedded.model, batch, options.budget):
                    said = [text(embedded, row) for row in tokens]
                    right[variant] += sum(
                        a in s.answers for a, s in zip(said, batch.samples, strict=True)
                    )
        for variant, count in right.items():
            print(f"{name:10s} {variant:28s} {count / options.limit:.3f}", flush=True)


if __name__ == "__main__":
    main()
