"""The answers of plphp on transformers to the requests of `serving`.

An answer is checked rather than generated: one forward reads all tokens that the engine gave, and
says what would have followed each of them. Up to the first token that differs these are the tokens
of generate(), which takes a forward for each.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import transformers
from serving import BLOCK, Request, about

import plphp
from plphp.demo.model import WEIGHTS, Embedded

MARGIN = 1e-3  # two implementations may order logits that are closer than this differently


@dataclass(frozen=True)
class Answer:
    """What transformers says to the tokens of an engine.

    tokens: the greedy token in the place of each token of the engine, given all before it
    margins: difference of the two highest logits in each place
    report: plphp's; length: tokens of the prompt
    """

    tokens: list[int]
    margins: list[float]
    report: Any
    length: int


ANSWERS: dict[Any, Answer] = {}


def agree(output: Any, embedded: Embedded, request: Request) -> bool | None:
    """Whether an engine's output is that of transformers; see `same`."""
    return same(output, answer(embedded, request, said(output)))


def answer(
    embedded: Embedded, request: Request, given: Sequence[int], round_to: int = BLOCK
) -> Answer:
    """What plphp on transformers says to the tokens `given` of an engine with this block size.

    The same tokens after the same request are read once.
    """
    key = (str(embedded.model.dtype), pickle.dumps(request), tuple(given), round_to)
    if key not in ANSWERS:
        inputs = inputs_of(embedded, request)
        ANSWERS[key] = read(embedded.model, inputs, request, given, round_to)
    return ANSWERS[key]


def inputs_of(embedded: Embedded, request: Request) -> Any:
    """The inputs of a request for the embedded model."""
    text = request.text(embedded.tokenizer)
    if request.videos:
        return processed(video_processor(), request, text)
    return embedded.inputs_of(request.images, text)


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
    model: Any,
    inputs: Any,
    request: Request,
    given: Sequence[int],
    round_to: int = BLOCK,
    mask: Any = None,
) -> Answer:
    """What any model in transformers says to the tokens of an engine.

    given: with none, the prompt alone is read
    mask: (1, N), the `vision_mask` of `plphp.prune`
    """
    assert not given or len(given) == request.tokens, "the engine gave another number of tokens"
    spans = None if mask is None else partial(of_prompt, mask)
    with attached(model, request, round_to, spans) as pruning, torch.inference_mode():
        cache = plphp.PrunedCache(model)
        # generate() also sets the positions that follow the prompt.
        logits = [*generate(model, inputs, 1, cache=cache).logits]
        report = pruning.report
        if len(given) > 1:
            rest = torch.tensor([given[:-1]])
            logits.append(model(input_ids=rest, cache=cache).logits[0])
    places = torch.cat(logits)[: len(given)].float()
    margins = margins_of(places)
    if (ends := model.generation_config.eos_token_id) is not None:  # one, or a list
        places[:, ends] = -torch.inf  # the engine is given `min_tokens`
    return Answer(places.argmax(1).tolist(), margins, report, inputs["input_ids"].shape[1])


def of_prompt(mask: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The mask of a prompt (1, N); for the tokens of its answer, zeros."""
    return mask if ids.shape == mask.shape else torch.zeros_like(ids)


def generated(model: Any, inputs: Any, request: Request) -> Answer:
    """The same from generate(), which is given no token."""
    with attached(model, request) as pruning:
        out = generate(model, inputs, request.tokens)
    length = inputs["input_ids"].shape[1]
    margins = margins_of(torch.cat(out.logits))
    return Answer(out.sequences[0, length:].tolist(), margins, pruning.report, length)


def margins_of(logits: torch.Tensor) -> list[float]:
    """The difference of the two highest logits of each place, (T, V)."""
    found: list[float] = logits.topk(2).values.diff().abs()[:, 0].tolist()
    return found


def generate(model: Any, inputs: Any, tokens: int, **options: Any) -> Any:
    """What generate() returns for this number of tokens, with their logits."""
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def attached(model: Any, request: Request, round_to: int = BLOCK, mask: Any = None) -> Any:
    """The policy of a request, attached to a model."""
    policy = rounded(request.policy or plphp.PLPHP(r=1, delta_r=0), round_to)
    return plphp.prune(model, policy, vision_mask=mask)


def rounded(policy: Any, round_to: int) -> Any:
    """The policy, which drops tokens by multiples of `round_to`, an option of PLPHP only."""
    if isinstance(policy, plphp.PLPHP):
        return replace(policy, round_to=round_to)
    kind = type(policy)
    return type(kind.__name__, (kind,), {"round_to": round_to})(**asdict(policy))


def said(output: Any) -> list[int]:
    """The tokens of an engine's output."""
    return list(output.outputs[0].token_ids)


def same(output: Any, expected: Answer) -> bool | None:
    """Whether tokens are equal; None where they first differ at nearly equal logits."""
    pairs = zip(said(output), expected.tokens, expected.margins, strict=True)
    for mine, theirs, margin in pairs:
        if mine != theirs:
            return None if margin < MARGIN else False
    return True
