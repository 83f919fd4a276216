"""Generation with the full and the pruned cache in turn: answers, bytes and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plphp.bench.ways import Round, Timing, Way, generate, timing
from plphp.policy import Policy
from plphp.recall import Recall
from plphp.report import Report


@dataclass(frozen=True)
class Comparison:
    """One prompt with the full and the pruned cache, which took turns on one machine.

    report: the report of the last pruned round
    """

    full: Timing
    pruned: Timing
    report: Report


def compare(
    model: Any,
    inputs: Mapping[str, Any],
    policy: Policy,
    rounds: int = 3,
    *,
    recall: Recall | None = None,
    kv_bits: int | None = None,
    kv_text: bool = False,
    **options: Any,
) -> Comparison:
    """Answer one prompt with the full and with the pruned cache in turn, and measure both.

    inputs: arguments of the model's generate(), one row
    rounds: how often each side is timed
    recall: where dropped tokens are parked; None frees them
    kv_bits, kv_text: as in `plphp.prune`
    options: further arguments of generate(), for greedy answers. The streamer and the cache are
        set here

    A short round of both sides, which is not counted, comes first, because first calls are slower.
    Raises the errors of `plphp.prune` for a model that cannot be pruned.
    """
    ways = (Way("full"), Way("pruned", policy, recall, kv_bits, kv_text))

    def pair(options: Mapping[str, Any]) -> list[Round]:
        return [generate(model, inputs, way, options) for way in ways]

    pair({**options, "max_new_tokens": 2})
    full, pruned = zip(*(pair(options) for _ in range(rounds)), strict=True)
    report = pruned[-1].report
    assert report is not None
    return Comparison(timing(full), timing(pruned), report)
