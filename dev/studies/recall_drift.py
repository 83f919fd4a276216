"""Does recall drift? KL(full || recalled) over 200 given tokens, by position.

    python dev/studies/recall_drift.py --prompts 32

The untouched model writes 200 tokens to prompts that ask for a long answer, and may not end;
every variant then reads the same tokens one by one. Mean KL in nats by position, in tenths.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.eval.answers import _crop, _read
from plphp.eval.batches import Batch, in_batches, make_batch
from plphp.eval.tasks import TASKS
from plphp.hf.shared_prefill import SharedPrefill, read
from plphp.inputs import load

SEED, BATCH, TOKENS, PARTS = 11, 16, 200, 10
VARIANTS: list[tuple[str, str, plphp.Recall | None]] = [
    ("plphp at .4", "plphp-flat", None),
    ("novelty at .4", "novelty", None),
    ("novelty at .2", "novelty", None),
    *((f"host at {b}", "novelty", plphp.Recall("host", b)) for b in (0.4, 0.2)),
    ("int4 at .4", "novelty", plphp.Recall("int4", 0.4)),
    ("int2 at .2", "novelty", plphp.Recall("int2", 0.2)),
    ("int4 of all", "novelty", plphp.Recall("int4", 0)),
]


def given(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """What the untouched model says (B, TOKENS), and the log-probabilities it was chosen from."""
    out = model.generate(
        **batch.inputs,
        min_new_tokens=TOKENS,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logits = torch.stack(out.logits, 1).float()
    return out.sequences[:, -TOKENS:], logits.log_softmax(-1)


def recalled(
    model: Any, batch: Batch, prompt: SharedPrefill, tokens: Tensor, variant: tuple[str, str, Any]
) -> Tensor:
    name, policy, recall = variant
    budget = 0.2 if name.endswith(".2") else 0.4
    with plphp.prune(model, plphp.policy(policy, budget=budget), recall=recall) as pruning:
        cache = prompt.pruned(pruning)
        _crop(cache, batch.columns)
        return _read(model, cache, batch, tokens[:, :-1], 1).log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    embedded = load("embedded", options.dtype, "cpu")
    found: dict[str, list[Tensor]] = {variant[0]: [] for variant in VARIANTS}
    for rows in in_batches(TASKS["long"].draw(options.prompts, SEED), BATCH, embedded.tokenizer):
        batch = make_batch(embedded, rows, TOKENS)
        with torch.inference_mode():
            tokens, full = given(embedded.model, batch)
            prompt = read(embedded.model, batch.prompt)
            for variant in VARIANTS:
                own = recalled(embedded.model, batch, prompt, tokens, variant)
                kl = (full[:, 1:].exp() * (full[:, 1:] - own)).sum(-1).clamp(min=0)
                found[variant[0]].append(kl)
    print("tokens".ljust(16), *(f"{i * TOKENS // PARTS:7d}+" for i in range(PARTS)))
    for name, parts in found.items():
        every = torch.cat(parts).mean(0).chunk(PARTS)
        print(name.ljust(16), *(f"{float(part.mean()):8.4f}" for part in every), flush=True)


if __name__ == "__main__":
    main()
