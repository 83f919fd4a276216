"""The answers of plphp on transformers to the requests of `serving`."""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import transformers
from serving import BLOCK, Request, about

import plphp
from plphp.demo.model import WEIGHTS, Embedded

MARGIN = 1e-3  # two implementations may order logits that are closer than this differently


@dataclass(frozen=True)
class Answer:
    """An answer of transformers.

    margins: difference of the two highest logits at each token
    report: plphp's; length: tokens of the prompt
    """

    tokens: list[int]
    margins: list[float]
    report: Any
    length: int


ANSWERS: dict[Any, Answer] = {}


def answer(embedded: Embedded, request: Request, round_to: int = BLOCK) -> Answer:
    """The answer of plphp on transformers, with `round_to` equal to the engine's block size.

    The same request is answered once: a decoded token takes transformers longer than the engine.
    """
    key = (str(embedded.model.dtype), pickle.dumps(request), round_to)
    if key not in ANSWERS:
        text = request.text(embedded.tokenizer)
        if request.videos:
            inputs = processed(video_processor(), request, text)
        else:
            inputs = embedded.inputs_of(request.images, text)
        ANSWERS[key] = read(embedded.model, inputs, request, round_to)
    return ANSWERS[key]


@cache
def video_processor() -> Any:
    """The embedded model's whole processor."""
    return transformers.AutoProcessor.from_pretrained(WEIGHTS)


def processed(processor: Any, request: Request, text: str) -> Any:
    """The inputs of a request for a model in transformers."""
    told = [transformers.video_utils.VideoMetadata(**about(video)) for video in request.videos]
    return processor(
        text=text,
        images=list(request.images) or None,
        videos=list(request.videos) or None,
        return_tensors="pt",
        **({"video_metadata": told} if told else {}),
    )


def read(
    model: Any, inputs: Any, request: Request, round_to: int = BLOCK, mask: Any = None
) -> Answer:
    """The answer of any model in transformers. mask: (1, N), the `vision_mask` of `plphp.prune`."""
    policy = rounded(request.policy or plphp.PLPHP(r=1, delta_r=0), round_to)
    with plphp.prune(model, policy, vision_mask=mask) as pruning:
        out = model.generate(
            **inputs,
            max_new_tokens=request.tokens,
            min_new_tokens=request.tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    length = inputs["input_ids"].shape[1]
    margins = [float(logits[0].topk(2).values.diff().abs()) for logits in out.logits]
    return Answer(out.sequences[0, length:].tolist(), margins, pruning.report, length)


def rounded(policy: Any, round_to: int) -> Any:
    """The policy, which drops tokens by multiples of `round_to`, an option of PLPHP only."""
    if isinstance(policy, plphp.PLPHP):
        return replace(policy, round_to=round_to)
    kind = type(policy)
    return type(kind.__name__, (kind,), {"round_to": round_to})(**asdict(policy))


def same(output: Any, expected: Answer) -> bool | None:
    """Whether tokens are equal; None where they first differ at nearly equal logits."""
    found = list(output.outputs[0].token_ids)
    for mine, theirs, margin in zip(found, expected.tokens, expected.margins, strict=True):
        if mine != theirs:
            return None if margin < MARGIN else False
    return True
