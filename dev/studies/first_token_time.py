"""CPU seconds to the first token of the methods of `plphp eval`, on the embedded model.

    python dev/studies/first_token_time.py --out docs/accuracy/first-token.json

The prompts are the first of each task of a suite, as `plphp eval` draws them. In every round each
prompt is read by the full model and then by each setting, in one process with one thread; a round
of one prompt before them is a warm-up. A time is that of the processor, so that other jobs on the
machine count little. It begins with the pixels that the model gets, and ends with the logits of the
first token. Each setting has the ratio to the full model of the same round, over the sum of all
prompts: median, lowest, highest. The images of `downsample` are made smaller before the time
begins.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import plphp
from plphp.bench.first_token import Stopwatch, timed
from plphp.bench.machine import describe
from plphp.eval.methods import FULL, Setting, make, parse
from plphp.eval.sample import Sample
from plphp.eval.shrink import shrinker
from plphp.eval.tasks import SUITES
from plphp.inputs import Runnable, load
from plphp.policy import Policy, policy

METHODS = (
    "random,uniform,plphp,novelty,downsample,divprune,cdpruner,dart,visionzip,"
    "divprune/plphp,divprune/novelty,visionzip/novelty"
)
TASKS = ("describe", "grid", "refer", "second", "what")
SEED = 7001  # that of the accuracy pages

Inputs = Mapping[str, Tensor]
Spent = dict[Setting, list[tuple[float, float]]]  # of each round: the whole, and the tower


def prompts_of(
    loaded: Runnable, samples: Sequence[Sample], policies: Mapping[Setting, Policy]
) -> dict[Setting, list[Inputs]]:
    """The inputs of each setting: smaller images for `downsample`, and the same for all others."""

    def read(by: Runnable, shown: Sequence[Sample]) -> list[Inputs]:
        return [by.inputs(one.images, one.earlier or one.question) for one in shown]

    found = dict.fromkeys(policies, read(loaded, samples))
    for setting, chosen in policies.items():
        if chosen.kind == "images":
            by = shrinker(loaded)
            found[setting] = read(by.loaded, by.shrink(samples, chosen))
    return found


def seconds(
    loaded: Runnable,
    policies: Mapping[Setting, Policy],
    prompts: Mapping[Setting, Sequence[Inputs]],
    rounds: int,
) -> Iterator[Spent]:
    """The CPU seconds of each setting in the rounds so far, summed over the prompts."""
    model, count = loaded.model, len(prompts[FULL])
    spent: Spent = {setting: [] for setting in policies}
    with torch.inference_mode(), Stopwatch(model.model.visual, "cpu", time.process_time) as tower:
        for turn in range(rounds + 1):
            sums = {setting: [0.0, 0.0] for setting in policies}
            for number in range(count if turn else 1):
                for setting, chosen in policies.items():
                    plain = setting == FULL or chosen.kind == "images"
                    with nullcontext() if plain else plphp.prune(model, chosen):
                        whole = timed(model, prompts[setting][number], "cpu", time.process_time)
                    sums[setting][0] += whole
                    sums[setting][1] += tower.seconds
            for setting, (whole, of_tower) in sums.items():
                if turn:
                    spent[setting].append((whole, of_tower))
            print(f"round {turn}: {sums[FULL][0]:.2f} s of the full model", flush=True)
            if turn:
                yield spent


def row(setting: Setting, mine: Sequence[Any], full: Sequence[Any]) -> dict[str, Any]:
    ratios = [own[0] / theirs[0] for own, theirs in zip(mine, full, strict=True)]
    return {
        "method": setting.method,
        "budget": setting.budget,
        "over_full": [round(f(ratios), 3) for f in (median, min, max)],
        "tower_share": round(median(own[1] / own[0] for own in mine), 3),
    }


def policies_of(loaded: Runnable, methods: str, budgets: str) -> dict[Setting, Policy]:
    """The policy of each setting that can run; `full` comes first."""
    named = methods.split(",")
    found = {FULL: policy("full")}
    for setting in parse(methods, budgets)[0]:
        if setting.method not in named:
            continue
        try:
            made = make(setting, loaded.model)
            if made.kind != "images":
                plphp.prune(loaded.model, made).remove()
        except ValueError as error:  # such as dart at .2: its first layers keep everything
            print(f"{setting} is left out: {error}", flush=True)
        else:
            found[setting] = made
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--suite", default="redundant-4")
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budgets", default=".5,.4,.25,.2")
    parser.add_argument("--limit", type=int, default=2, help="prompts of each task")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load("embedded", "float32", "cpu", None)
    tasks = [SUITES[given.suite][f"{task}@{given.suite}"] for task in given.tasks.split(",")]
    samples = [sample for task in tasks for sample in task.draw(given.limit, SEED)]
    policies = policies_of(loaded, given.methods, given.budgets)
    prompts, config = prompts_of(loaded, samples, policies), loaded.model.config
    tokens = [int((plphp.vision_spans(config, **one) > 0).sum()) for one in prompts[FULL]]
    about = describe("cpu") | {
        "dtype": "float32",
        "suite": given.suite,
        "prompts": len(samples),
        "vision_tokens": [min(tokens), round(median(tokens)), max(tokens)],
    }
    rows = []
    for spent in seconds(loaded, policies, prompts, given.rounds):
        rows = [row(setting, found, spent[FULL]) for setting, found in spent.items()]
        each = median(whole for whole, _ in spent[FULL]) / len(samples)
        about |= {"rounds": len(spent[FULL]), "seconds": round(each, 3)}
        if given.out:  # a run that is interrupted leaves its rounds
            given.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    for one in rows:
        middle, low, high = one["over_full"]
        share = f"{middle:.2f} ({low:.2f} to {high:.2f}), tower {one['tower_share']:.0%}"
        print(f"{one['method']} {one['budget']}: {share}")


if __name__ == "__main__":
    main()
