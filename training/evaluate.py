"""Held-out answers of a model directory.

    python -m training.evaluate --model DIR        # from the root of the repository

What is measured is what users run: image processor, tokenizer, chat template and ``generate``, one
prompt at a time. The prompts are drawn with a seed that training never used; those of easy-VQA are
of its test split, in their original files.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from plphp.demo.boards import render
from plphp.demo.model import WEIGHTS, Embedded, load
from plphp.demo.questions import LEVELS, TASKS, Level, draw_prompt, draw_size
from training.easy_vqa import EasyVQA

SEED = 20240


@dataclass(frozen=True)
class Sample:
    images: list[Image.Image]
    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    pictures: int
    exact: bool
    words: float


def draw_samples(task: str, level: Level, min_vision_tokens: int, seed: int) -> Iterator[Sample]:
    """Endlessly: prompts of one question each."""
    rng = np.random.default_rng([seed, sum(map(ord, task))])
    if task == "easyvqa":
        yield from _easy_samples(rng)
    while True:
        count, side = draw_size(rng, level)
        if count * side * side < min_vision_tokens:
            continue
        pictures, questions = draw_prompt(rng, level, count, side, [task])
        if questions:
            images = [Image.fromarray(render(picture, rng)) for picture in pictures]
            yield Sample(images, questions[0].text, questions[0].answer)


def answer(embedded: Embedded, images: list[Image.Image], question: str) -> str:
    """What the model says."""
    inputs = embedded.inputs(images, question)
    with torch.inference_mode():
        ids = embedded.model.generate(**inputs)
    return embedded.decode(ids[0, inputs["input_ids"].shape[1] :])


def word_accuracy(said: str, wanted: str) -> float:
    """The share of words that are right and in their place."""
    said_words, wanted_words = said.split(), wanted.split()
    right = sum(a == b for a, b in zip(said_words, wanted_words, strict=False))
    return right / max(len(said_words), len(wanted_words))


def evaluate(embedded: Embedded, task: str, options: argparse.Namespace) -> list[Score]:
    """Scores of ``options.n`` prompts; prints the first ``options.show``."""
    level = LEVELS[options.level]
    samples = draw_samples(task, level, options.min_vision_tokens, options.seed)
    scores = []
    for i, sample in zip(range(options.n), samples, strict=False):
        said = answer(embedded, sample.images, sample.question)
        exact, words = said == sample.answer, word_accuracy(said, sample.answer)
        scores.append(Score(len(sample.images), exact, words))
        if i < options.show:
            print(f"  {sample.question} | wanted: {sample.answer} | said: {said}")
    return scores


def summary(scores: list[Score]) -> dict[str, float]:
    """Mean exact match and word accuracy, and exact match by the number of pictures."""
    out = {"exact": np.mean([s.exact for s in scores]), "words": np.mean([s.words for s in scores])}
    for pictures in sorted({score.pictures for score in scores}):
        alike = [score.exact for score in scores if score.pictures == pictures]
        out[f"exact, {pictures} pictures"] = np.mean(alike)
    return {name: round(float(value), 3) for name, value in out.items()}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    embedded = load(getattr(torch, options.dtype), path=options.model)
    results = {}
    for task in options.tasks.split(","):
        results[task] = summary(evaluate(embedded, task, options))
        print(task, json.dumps(results[task]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def _easy_samples(rng: np.random.Generator) -> Iterator[Sample]:
    easy = EasyVQA("test")
    while True:
        i = int(rng.integers(len(easy.questions)))
        question = easy.questions[i][int(rng.integers(len(easy.questions[i])))]
        yield Sample([easy.images[i]], question.text, question.answer)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="the model directory")
    parser.add_argument("--tasks", default=",".join([*TASKS, "easyvqa"]))
    parser.add_argument("--n", type=int, default=200, help="prompts per task")
    parser.add_argument("--level", type=int, default=3, choices=range(len(LEVELS)))
    parser.add_argument("--min-vision-tokens", type=int, default=100)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--show", type=int, default=0, help="prompts per task to print")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
