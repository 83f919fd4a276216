"""Measures the answers of a model with the full and the pruned cache, on held-out prompts.

    python -m training.evaluate --model DIR        # from the root of the repository

It runs what users run: image processor, tokenizer, chat template and ``generate``, with one prompt
at a time. Prompts are drawn with a seed that training never used. The photographs are held out, and
the pictures of easy-VQA are the original files of its test split. The regime ``level-3`` has the
most difficult boards of the demo: square boards on paper, on which a thing covers one token.

With ``--packed`` no answer is generated. Many questions share one prompt, and an answer is right if
the model finds each of its tokens the most probable one after the right tokens before it. This
gives the exact match of the full cache in a fortieth of the time.

Pictures keep their size: the limit of the model's image processor is raised to 4,096 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import plphp
from plphp.demo.boards import render
from plphp.demo.model import WEIGHTS, Embedded, load
from plphp.demo.questions import LEVELS, MIX, TASKS, draw_prompt, draw_size
from plphp.demo.regimes import REGIMES, SILENCE, Preamble, Regime, draw, draw_frame
from training.batches import level_batch, regime_batch
from training.build import PROCESSOR
from training.easy_vqa import EasyVQA
from training.joint_stage import Learner
from training.vision_stage import Words

SEED = 20240
LEAST_VISION_TOKENS = 100  # the smallest number of vision tokens in a prompt of level-3
BUDGET = 0.4
METHODS: Mapping[str, Any] = {
    "full": None,
    "plphp": plphp.PLPHP(),
    **{
        name: plphp.policy(name, budget=BUDGET)
        for name in ("uniform", "random", "snapkv", "novelty")
    },
}


@dataclass(frozen=True)
class Sample:
    images: list[Image.Image]
    question: str
    answer: str
    preamble: Preamble = SILENCE


@dataclass
class Seen:
    """The results of a regime's prompts, in their order."""

    exact: dict[str, dict[str, list[bool]]] = field(default_factory=dict)  # task, method
    words: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    kept: dict[str, list[float]] = field(default_factory=dict)  # method
    gamma: list[list[float]] = field(default_factory=list)  # prompt, layer
    tokens: list[int] = field(default_factory=list)  # vision tokens of each prompt

    def summary(self) -> dict[str, Any]:
        """The means of all results; gamma is one number per layer."""
        out: dict[str, Any] = {
            name: {task: _means(by_method) for task, by_method in found.items()}
            for name, found in (("exact", self.exact), ("words", self.words))
        }
        out["kept"] = _means(self.kept)
        if self.gamma:
            out["gamma"] = np.round(np.mean(self.gamma, 0), 3).tolist()
        out["vision tokens"] = round(float(np.mean(self.tokens)))
        return out


def draw_samples(regime: str, task: str, options: argparse.Namespace) -> Iterator[Sample]:
    """An endless sequence of prompts with one question each."""
    rng = np.random.default_rng([options.seed, sum(map(ord, task))])
    if task == "easyvqa":
        return _easy_samples(rng)
    if regime == "level-3":
        return _level_samples(rng, task)
    changed = replace(REGIMES[regime], reworded=options.reworded, chatty=options.chatty)
    return _regime_samples(rng, changed, task)


def ask(embedded: Embedded, sample: Sample, policy: Any) -> tuple[str, Any]:
    """The answer of the model, and plphp's report, or None without a policy."""
    messages = sample.preamble.messages(len(sample.images), sample.question)
    text = embedded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    inputs = embedded.inputs_of(sample.images, text)
    report = None
    with torch.inference_mode():
        if policy is None:
            ids = embedded.model.generate(**inputs)
        else:
            with plphp.prune(embedded.model, policy) as pruning:
                ids = embedded.model.generate(**inputs)
                report = pruning.report
    return embedded.decode(ids[0, inputs["input_ids"].shape[1] :]), report


def word_accuracy(said: str, wanted: str) -> float:
    """The share of words that are right and in their place."""
    said_words, wanted_words = said.split(), wanted.split()
    right = sum(a == b for a, b in zip(said_words, wanted_words, strict=False))
    return right / max(len(said_words), len(wanted_words))


def evaluate(
    embedded: Embedded, regime: str, task: str, options: argparse.Namespace, seen: Seen
) -> None:
    """Answer ``options.n`` prompts, add the results to ``seen``, and print some of the answers."""
    samples = draw_samples(regime, task, options)
    for i, sample in zip(range(options.n), samples, strict=False):
        seen.tokens.append(sum(image.width * image.height for image in sample.images) // 28**2)
        for method in options.methods.split(","):
            said, report = ask(embedded, sample, METHODS[method])
            words = word_accuracy(said, sample.answer)
            seen.exact.setdefault(task, {}).setdefault(method, []).append(said == sample.answer)
            seen.words.setdefault(task, {}).setdefault(method, []).append(words)
            if report is not None:
                seen.kept.setdefault(method, []).append(float(report.retention))
            if method == "plphp":
                seen.gamma.append([layer.gamma[0] for layer in report.layers])
            if i < options.show:
                print(f"  {method}: {sample.question} | {sample.answer} | said: {said}")


def packed(
    embedded: Embedded, regime: str, prompts: int, seed: int, **changes: float
) -> dict[str, float]:
    """The exact match of the full cache by task, on prompts with many questions each."""
    model, tokenizer = embedded.model, embedded.tokenizer
    learner = Learner(model, tokenizer, Words(tokenizer, model.lm_head.weight))
    rng = np.random.default_rng([seed, 1])
    found: dict[str, list[float]] = {}
    for _ in range(prompts):
        if regime == "level-3":
            batch = level_batch(rng, 3, MIX, 1)
        else:
            batch = regime_batch(rng, replace(REGIMES[regime], **changes), MIX, 1)
        with torch.inference_mode():
            _, seen, _ = learner.answer(batch, learner.see(batch, learn=False), second=False)
        for task, right in seen.items():
            found.setdefault(task.partition("@")[0], []).append(right)
    return _means(found)


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    embedded = load(getattr(torch, options.dtype), path=options.model)
    for name in ("size", "min_pixels", "max_pixels"):
        setattr(embedded.image_processor, name, PROCESSOR[name])
    results: dict[str, Any] = {}
    changes = {"reworded": options.reworded, "chatty": options.chatty}
    for regime in options.regimes.split(","):
        if options.packed:
            results[regime] = packed(embedded, regime, options.n, options.seed, **changes)
            print(regime, json.dumps(results[regime]), flush=True)
            continue
        seen = Seen()
        for task in options.tasks.split(","):
            evaluate(embedded, regime, task, options, seen)
            print(regime, task, json.dumps(_means(seen.exact[task])), flush=True)
        results[regime] = seen.summary()
        rest = {name: results[regime].get(name) for name in ("kept", "gamma", "vision tokens")}
        print(regime, json.dumps(rest), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def _means(by_name: Mapping[str, list[Any]]) -> dict[str, float]:
    return {name: round(float(np.mean(values)), 3) for name, values in by_name.items()}


def _regime_samples(rng: np.random.Generator, regime: Regime, task: str) -> Iterator[Sample]:
    while True:
        frame = draw_frame(rng, regime)
        prompt = draw(rng, regime, frame, [task])
        if prompt.questions:
            _, text, answer = prompt.questions[0]
            images = [Image.fromarray(image) for image in prompt.images]
            yield Sample(images, text, answer, frame.preamble)


def _level_samples(rng: np.random.Generator, task: str) -> Iterator[Sample]:
    level = LEVELS[3]
    while True:
        count, side = draw_size(rng, level)
        if count * side * side < LEAST_VISION_TOKENS:
            continue
        pictures, questions = draw_prompt(rng, level, count, side, [task])
        if questions:
            images = [Image.fromarray(render(picture, rng)) for picture in pictures]
            yield Sample(images, questions[0].text, questions[0].answer)


def _easy_samples(rng: np.random.Generator) -> Iterator[Sample]:
    easy = EasyVQA("test")
    while True:
        i = int(rng.integers(len(easy.questions)))
        question = easy.questions[i][int(rng.integers(len(easy.questions[i])))]
        yield Sample([easy.images[i]], question.text, question.answer)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the model directory")
    parser.add_argument("--regimes", default=",".join(["level-3", *REGIMES]))
    parser.add_argument(
        "--tasks",
        default="what,refcolor,describe,describe_all,read",
        help=f"names from {', '.join(TASKS)}, easyvqa, with commas between them",
    )
    parser.add_argument(
        "--methods",
        default="full,plphp",
        help=f"names from {', '.join(METHODS)}, with commas between them",
    )
    parser.add_argument("--n", type=int, default=100, help="the number of prompts per task")
    parser.add_argument(
        "--packed", action="store_true", help="measure the full cache only, without generate"
    )
    parser.add_argument(
        "--reworded", type=float, default=0.0, help="the share of questions in other words"
    )
    parser.add_argument(
        "--chatty", type=float, default=0.0, help="the share of prompts with other text around"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--show", type=int, default=0, help="the number of prompts to print per task"
    )
    parser.add_argument("--json", type=Path, help="the file for the results")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
