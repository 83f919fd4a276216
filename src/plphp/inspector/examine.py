"""Run one prompt with every policy and collect the data of the inspector's page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plphp._words import counted
from plphp.bench import Comparison, Way, compare
from plphp.bench.machine import describe
from plphp.bench.ways import Timing
from plphp.errors import InputError
from plphp.hf.shared_prefill import read
from plphp.inputs import Runnable, told_apart
from plphp.inspector.data import Answer, Page, PolicyResult, Steps
from plphp.inspector.gather import page_of, result_of
from plphp.inspector.pictures import Media
from plphp.inspector.steps import READ_BYTES, steps_of
from plphp.policy import Policy
from plphp.recall import Recall
from plphp.report import Report


def examine(
    loaded: Runnable,
    inputs: Mapping[str, Tensor],
    policies: Mapping[str, Policy],
    images: Sequence[Media],
    prompt: str,
    *,
    model: str = "",
    max_new_tokens: int = 128,
    rounds: int = 3,
    oracle: bool = False,
    recall: Recall | None = None,
    kv_bits: int | None = None,
    kv_text: bool = False,
    advance: Callable[[str], None] = lambda stage: None,
) -> Page:
    """Answer one prompt with the full cache and with every policy, and measure both.

    inputs: arguments of the model's generate(), one row
    images: the images in the order of the prompt. The page leaves them out if the model counts
        another number of images, as some do for crops and frames
    rounds: how often the full and the pruned side are timed in turn
    oracle: whether the full model also reads the pruned answer, for `Steps.lost` and `Steps.kl`
    recall, kv_bits, kv_text: as in `plphp.prune`
    advance: called before every stage with a line for the user

    Raises InputError for a prompt without images, and the errors of `plphp.prune`.
    """
    advance("reading the prompt")
    with torch.inference_mode():
        window = max(policy.window for policy in policies.values())
        whole = read(loaded.model, inputs, window)
    count, limit = _images(whole.cache.report), READ_BYTES // len(policies)
    runs = []
    generation: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
    held: dict[str, Any] = {"recall": recall, "kv_bits": kv_bits, "kv_text": kv_text}
    for name, policy in policies.items():
        advance(f"{name}: full and pruned in turn")
        compared = compare(loaded.model, inputs, policy, rounds, **held, **generation)
        advance(f"{name}: step by step")
        decode = _text(loaded) if oracle else None
        way, tokens = Way(name, policy, **held), compared.pruned.tokens
        steps = steps_of(loaded.model, inputs, way, whole, tokens, decode, limit)
        compared = _without_doubt(compared, images, count)
        runs.append(_result(loaded, compared, name, policy, steps))
    processor, made = _image_processor(loaded), _made(str(loaded.model.device), rounds)
    images = images if len(images) == count else ()
    return page_of(
        compared.report, runs, images, prompt, model=model, processor=processor, made=made
    )


def _without_doubt(compared: Comparison, images: Sequence[Media], count: int) -> Comparison:
    """The same without a note on frames, if the model counts as many images as were given.

    Otherwise it counts crops or frames as images, and the note may be right.
    """
    if len(images) != count:
        return compared
    videos = any(isinstance(one, list | tuple) for one in images)
    return replace(compared, report=told_apart(compared.report, videos))


def _images(report: Report | None) -> int:
    """The number of images of a prompt. Raises InputError if there are none."""
    if report is None or not report.images[0]:
        raise InputError("nothing to inspect: the prompt has no image that the model can see")
    return report.images[0]


def _result(
    loaded: Runnable, compared: Comparison, name: str, policy: Policy, steps: Steps
) -> PolicyResult:
    """The result of one policy with its answers and times."""
    return replace(
        result_of(compared.report, name, policy),
        answer=_answer(loaded, compared.pruned),
        full=_answer(loaded, compared.full),
        differs=first_difference(compared.full.tokens, compared.pruned.tokens),
        steps=steps,
    )


def _image_processor(loaded: Runnable) -> Any:
    """The image processor of the embedded model, or that of a processor."""
    owner = loaded if hasattr(loaded, "image_processor") else getattr(loaded, "processor", None)
    return getattr(owner, "image_processor", None)


def first_difference(full: Tensor, pruned: Tensor) -> int | None:
    """Index of the first token that differs between two answers (T,); None if all are equal."""
    one, other = full.tolist(), pruned.tolist()
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def pieces(decode: Callable[[Tensor], str], tokens: Tensor) -> tuple[str, ...]:
    """The text that each token (T,) adds.

    A character that consists of several tokens belongs to the last of them.
    """
    found, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count])
        if text.endswith("\ufffd") and count < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return tuple(found)


def _answer(loaded: Runnable, timing: Timing) -> Answer:
    step = timing.step_ms
    return Answer(
        text=loaded.decode(timing.tokens),
        tokens=pieces(loaded.decode, timing.tokens),
        first_ms=round(timing.first_ms, 2),
        ms_per_token=None if step != step else round(step, 3),
    )


def _text(loaded: Runnable) -> Callable[[Tensor], str]:
    """A function that decodes single tokens; special tokens are shown by their names."""
    return lambda token: str(loaded.tokenizer.decode(token))


def _made(device: str, rounds: int) -> dict[str, str]:
    told = {name: str(value) for name, value in describe(device).items() if value is not None}
    return {**told, "times": f"medians of {counted(rounds, 'round')}, full and pruned in turn"}
