"""Which layers need the tokens that the budget allows, and what an index may cost.

    python dev/studies/recall_layers.py --task long --budget .2

"host" at a budget of device bytes, dealt out among the layers by other weights than the package's
(`recall.budget.dealt`), and with more directions in the index. Every variant reads the untouched
model's answer token by token: the share of answers all of whose tokens it would have said too, and
KL from the untouched model in nats, its mean and the mean of its root (few answers make the mean).
The findings are in docs/recall-results.md.
"""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import plphp
from plphp.eval.answers import Reference, _crop, _read, compare, refer
from plphp.eval.batches import Batch, in_batches, make_batch
from plphp.eval.feature_cache import remembered
from plphp.eval.tasks import TASKS
from plphp.hf.shared_prefill import SharedPrefill, read
from plphp.inputs import load
from plphp.recall.budget import Place

SEED, BATCH = 7101, 16
FLAT = (1.0,) * 6
VARIANTS: dict[str, tuple[tuple[float, ...], int]] = {  # weights of the layers, directions
    "all alike": (FLAT, 8),
    "6 directions": (FLAT, 6),
    "10 directions": (FLAT, 10),
    "12 directions": (FLAT, 12),
    "first third twice": ((2, 2, 1, 1, 1, 1), 8),
    "first third thrice": ((3, 3, 1, 1, 1, 1), 8),
    "first half twice": ((2, 2, 2, 1, 1, 1), 8),
    "pyramid of .5": ((1.5, 1.3, 1.1, 0.9, 0.7, 0.5), 8),
    "pyramid of .9": ((1.9, 1.54, 1.18, 0.82, 0.46, 0.1), 8),
    "by vision attention": ((0.05, 0.73, 0.56, 0.62, 0.58, 0.63), 8),
    **{f"layer {i} a third": ((*FLAT[:i], 1 / 3, *FLAT[i + 1 :]), 8) for i in range(6)},
}


def weighted(weights: tuple[float, ...]) -> Any:
    def dealt(mean: Tensor, tokens: Tensor, place: Place) -> Tensor:
        return mean * weights[place[0]] * len(weights) / sum(weights)

    return mock.patch("plphp.recall.budget.dealt", dealt)


def compared(
    model: Any, batch: Batch, reference: Reference, prompt: SharedPrefill, recall: plphp.Recall
) -> tuple[list[bool], list[float]]:
    with plphp.prune(model, plphp.policy("novelty"), recall=recall) as pruning:
        cache = prompt.pruned(pruning)
        _crop(cache, batch.columns)
        rest = _read(model, cache, batch, reference.tokens[:, :-1], 1)
    kl, agree = compare(reference, torch.cat([prompt.logits[:, None].float(), rest], 1))
    return [all(row) for row in agree], [sum(row[1:]) / max(len(row) - 1, 1) for row in kl]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="long")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--limit", type=int, default=144)
    options = parser.parse_args()
    embedded = load("embedded", "bfloat16", "cpu")
    model = embedded.model
    same: dict[str, list[bool]] = {name: [] for name in VARIANTS}
    kl: dict[str, list[float]] = {name: [] for name in VARIANTS}
    drawn = TASKS[options.task].draw(options.limit, SEED)
    for rows in in_batches(drawn, BATCH, embedded.tokenizer):
        batch = make_batch(embedded, rows, 128)
        with torch.inference_mode(), remembered(model):
            reference, prompt = refer(model, batch), read(model, batch.prompt)
            for name, (weights, rank) in VARIANTS.items():
                recall = plphp.Recall(budget=options.budget, rank=rank)
                with weighted(weights):
                    found = compared(model, batch, reference, prompt, recall)
                same[name] += found[0]
                kl[name] += found[1]
    for name in VARIANTS:
        every = torch.tensor(kl[name])
        share, root = sum(same[name]) / len(every), every.sqrt().mean()
        print(
            f"{name:20s} the same {share:.3f}, KL {every.mean():.5f}, root {root:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
