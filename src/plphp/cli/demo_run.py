"""The measurements of `plphp demo`: answers in every way, and times of long prompts in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from plphp.errors import InputError, PlphpError
from plphp.policy import PLPHP, Policy, policy

if TYPE_CHECKING:
    from plphp.bench import Timing, Way
    from plphp.bench.decode import Decoded
    from plphp.cli.demo_prompts import Item, LongBatch
    from plphp.inputs import Runnable
    from plphp.report import Report

STEPS = 8  # tokens that every way decodes in a round
FULL, PUBLISHED, RECOMMENDED = "full cache", "PLPHP() as published", "recommended 40%"
HOST, INT4 = "recall host 20%", "recall int4 40%"
# How the ways besides PLPHP are written in Python.
CODE = {
    RECOMMENDED: 'policy("recommended", budget=.4)',
    HOST: 'recall=Recall("host", .2)',
    INT4: 'recall=Recall("int4", .4)',
}
IN_CODES = {bits: f"{RECOMMENDED}, {bits} bits" for bits in (4, 2)}
CODE |= {name: f"{CODE[RECOMMENDED]}, kv_bits={bits}" for bits, name in IN_CODES.items()}


@dataclass(frozen=True)
class Answered:
    """The answer to one question in one way. report: None for the full cache."""

    text: str
    timing: Timing
    report: Report | None


@dataclass(frozen=True)
class Asked:
    """One question, answered in every way. answers: name of the way -> answer, full cache first"""

    item: Item
    answers: dict[str, Answered]

    @property
    def wanted(self) -> str:
        """The right answer, or that of the full cache where none is known."""
        full = next(iter(self.answers.values())).text
        return full if self.item.expected is None else self.item.expected

    def right(self, way: str) -> bool:
        return self.answers[way].text == self.wanted


@dataclass(frozen=True)
class Result:
    """One line of the screen.

    right: questions with the right answer, or with that of the full cache where none is known
    on_device: share of the vision K/V on the device, in the long batch
    kv_bytes, parked_bytes: of the long batch, on the device and in main memory
    step_ms: milliseconds of a decoding step of the long batch, all rows together
    first_ms: milliseconds until the first token of one long prompt
    step_ratio, first_ratio: over the full cache in the same round, the median over the rounds. Only
        JSON has them: the screen divides the times that it shows
    """

    name: str
    right: int
    questions: int
    on_device: float
    kv_bytes: int
    parked_bytes: int
    step_ms: float
    step_ratio: float
    first_ms: float
    first_ratio: float

    def to_dict(self, judge: str) -> dict[str, Any]:
        """The numbers for JSON. judge: the key of the number of right answers"""
        return {
            "name": self.name,
            judge: self.right,
            "questions": self.questions,
            "vision_kv_on_device": self.on_device,
            "kv_bytes": self.kv_bytes,
            "parked_bytes": self.parked_bytes,
            "ms_per_token": self.step_ms,
            "ms_per_token_over_full": self.step_ratio,
            "first_token_ms": self.first_ms,
            "first_token_over_full": self.first_ratio,
        }


def ways(chosen: Policy, kv_bits: int | None = None) -> list[Way]:
    """The ways of the screen.

    chosen: PLPHP with the user's options
    kv_bits: with it, a last way stores in codes what the recommended method keeps

    Raises ValueError for other numbers of bits than 4 and 2.
    """
    from plphp.bench import Way
    from plphp.recall import KeptBits, Recall

    recommended = policy("recommended", budget=0.4)
    published = chosen == PLPHP()
    kept = None if kv_bits is None else KeptBits(kv_bits)
    coded = [] if kept is None else [Way(IN_CODES[kept.bits], recommended, kv_bits=kept.bits)]
    return [
        Way(FULL),
        Way(PUBLISHED if published else _written(chosen), chosen),
        Way(RECOMMENDED, recommended),
        Way(HOST, recommended, Recall("host", 0.2)),
        Way(INT4, recommended, Recall("int4", 0.4)),
        *coded,
    ]


def possible(model: Any, every: Sequence[Way]) -> tuple[list[Way], dict[str, str]]:
    """The ways that a model can go, and for each of the others the reason.

    Raises as `plphp.prune` for a model that cannot be pruned at all.
    """
    able, reasons = [], {}
    for way in every:
        try:
            with way.attach(model):
                able.append(way)
        except PlphpError as error:
            if way.recall is None and way.kv_bits is None:
                raise
            reasons[way.name] = " ".join(str(error).split())
    return able, reasons


def ask(
    loaded: Runnable, items: Sequence[Item], every: Sequence[Way], advance: Callable[[], None]
) -> list[Asked]:
    """Answer every question in every way, by generate(), one after another.

    advance: called after each answer

    Raises InputError if the model's attention is not a number: its answers would all be the same.
    """
    import torch

    from plphp.bench.ways import generate, timing
    from plphp.report import refuse_undefined

    def answer(item: Item, way: Way, limit: int) -> Answered:
        options = {"max_new_tokens": limit, "do_sample": False, "num_beams": 1}
        once = generate(loaded.model, item.inputs, way, options)
        if once.report is not None:
            refuse_undefined(once.report.undefined)
        return Answered(loaded.decode(once.tokens[0]), timing([once]), once.report)

    found = []
    with torch.inference_mode():
        for way in every:  # first calls are slower
            answer(items[0], way, 2)
        for item in items:
            answers = {}
            for way in every:
                answers[way.name] = answer(item, way, item.limit)
                advance()
            found.append(Asked(item, answers))
    return found


def measure(
    loaded: Runnable,
    asked: Sequence[Asked],
    batch: LongBatch,
    every: Sequence[Way],
    rounds: int,
    advance: Callable[[], None],
) -> list[Result]:
    """Measure first tokens and decoding steps of long prompts, all ways in each round.

    advance: called 1 + 2 * rounds * len(every) times. Raises InputError if the memory is too small.
    """
    import torch

    from plphp.bench.decode import decode_in_turn

    try:
        first = _first_tokens(loaded, batch, every, rounds, advance)
        decoded = decode_in_turn(loaded.model, batch.inputs, every, STEPS, rounds, advance)
    except torch.OutOfMemoryError:
        raise InputError(
            f"there is no memory left for {batch.rows} rows of {batch.vision:,} vision tokens: "
            "give a smaller --batch or --vision-tokens"
        ) from None
    return [
        _result(asked, one, times, decoded[0], first[0])
        for one, times in zip(decoded, first, strict=True)
    ]


def _first_tokens(
    loaded: Runnable,
    batch: LongBatch,
    every: Sequence[Way],
    rounds: int,
    advance: Callable[[], None],
) -> list[list[float]]:
    """For each way the seconds until the first token of one long prompt, round by round."""
    import torch

    from plphp.bench.ways import generate, timing

    seconds: list[list[float]] = [[] for _ in every]
    options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1}
    with torch.inference_mode():
        generate(loaded.model, batch.one, every[0], options)  # the first of its size is slower
        for _ in range(rounds):
            for way, times in zip(every, seconds, strict=True):
                times += timing([generate(loaded.model, batch.one, way, options)]).first
                advance()
    return seconds


def _result(
    asked: Sequence[Asked],
    one: Decoded,
    first: Sequence[float],
    full: Decoded,
    full_first: Sequence[float],
) -> Result:
    name = one.way.name
    return Result(
        name=name,
        right=sum(question.right(name) for question in asked),
        questions=len(asked),
        on_device=one.on_device,
        kv_bytes=one.kv_bytes,
        parked_bytes=one.parked_bytes,
        step_ms=one.step_ms,
        step_ratio=one.ratio(full),
        first_ms=1e3 * median(first),
        first_ratio=median(a / b for a, b in zip(first, full_first, strict=True)),
    )


def _written(chosen: Policy) -> str:
    """A policy as Python writes it, with the options that are not the defaults."""
    given = vars(chosen).items() - vars(type(chosen)()).items()
    options = ", ".join(f"{k}={v:g}" for k, v in vars(chosen).items() if (k, v) in given)
    return f"{type(chosen).__name__}({options})"
