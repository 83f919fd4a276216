"""Everything that the inspector's page shows of one prompt, from running it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from plphp.bench import Comparison, compare
from plphp.bench.compare import Run as Timed
from plphp.bench.machine import describe
from plphp.errors import InputError
from plphp.hf.shared_prefill import read
from plphp.inputs import Runnable
from plphp.inspector.data import Answer, Page, Run, Steps
from plphp.inspector.gather import page_of, run_of
from plphp.inspector.pictures import Media
from plphp.inspector.steps import READ_BYTES, steps_of
from plphp.policy import Policy
from plphp.recall import Recall


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
    advance: Callable[[str], None] = lambda stage: None,
) -> Page:
    """Answer one prompt with the full cache and with every policy's; measure, and look inside.

    images: as the user gave them, in prompt order, left out of the page where the model counts
        others than these (crops, frames); inputs: what the model is given, one row
    rounds: how often full and pruned are timed in turn; oracle: also ask the full model
    recall: what becomes of tokens that policies drop, None to destroy them
    advance: called with a line for people before every stage
    Raises InputError for a prompt without images, and what `plphp.prune` raises.
    """
    advance("reading the prompt")
    with torch.inference_mode():
        window = max(policy.window for policy in policies.values())
        whole = read(loaded.model, inputs, window)
    found = whole.cache.report
    if found is None or not found.images[0]:
        raise InputError("nothing to inspect: the prompt has no image that the model can see")
    runs, generation = [], {"max_new_tokens": max_new_tokens, "do_sample": False}
    for name, policy in policies.items():
        advance(f"{name}: full and pruned in turn")
        compared = compare(loaded.model, inputs, policy, rounds, recall=recall, **generation)
        advance(f"{name}: step by step")
        decode = _text(loaded) if oracle else None
        room = READ_BYTES // len(policies)
        tokens = compared.pruned.tokens
        steps = steps_of(loaded.model, inputs, policy, whole, tokens, decode, recall, room)
        runs.append(_run(loaded, compared, name, policy, steps))
    processor = _image_processor(loaded)
    images = images if len(images) == found.images[0] else ()
    made = _made(str(loaded.model.device), rounds)
    return page_of(
        compared.report, runs, images, prompt, model=model, processor=processor, made=made
    )


def _run(loaded: Runnable, compared: Comparison, name: str, policy: Policy, steps: Steps) -> Run:
    """What the page shows of one policy."""
    return replace(
        run_of(compared.report, name, policy),
        answer=_answer(loaded, compared.pruned),
        full=_answer(loaded, compared.full),
        differs=first_difference(compared.full.tokens, compared.pruned.tokens),
        steps=steps,
    )


def _image_processor(loaded: Runnable) -> Any:
    """What cut the pictures up: the embedded model's own, or part of a processor."""
    owner = loaded if hasattr(loaded, "image_processor") else getattr(loaded, "processor", None)
    return getattr(owner, "image_processor", None)


def first_difference(full: Tensor, pruned: Tensor) -> int | None:
    """Index of the first token (T,) that is not the same; None where none is."""
    one, other = full.tolist(), pruned.tolist()
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def pieces(decode: Callable[[Tensor], str], tokens: Tensor) -> tuple[str, ...]:
    """What each token (T,) adds to the text; a character in parts comes with its last part."""
    found, before = [], ""
    for count in range(1, len(tokens) + 1):
        text = decode(tokens[:count])
        if text.endswith("\ufffd") and count < len(tokens):
            found.append("")
            continue
        found.append(text[len(before) :])
        before = text
    return tuple(found)


def _answer(loaded: Runnable, run: Timed) -> Answer:
    step = run.step_ms
    return Answer(
        text=loaded.decode(run.tokens),
        tokens=pieces(loaded.decode, run.tokens),
        first_ms=round(run.first_ms, 2),
        ms_per_token=None if step != step else round(step, 3),
    )


def _text(loaded: Runnable) -> Callable[[Tensor], str]:
    """The text of a token by itself, special tokens shown by name."""
    return lambda token: str(loaded.tokenizer.decode(token))


def _made(device: str, rounds: int) -> dict[str, str]:
    told = {name: str(value) for name, value in describe(device).items() if value is not None}
    return {**told, "times": f"medians of {rounds} rounds, full and pruned in turn"}
