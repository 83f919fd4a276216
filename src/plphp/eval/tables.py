"""The summary of a run as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from plphp._words import counted
from plphp.eval.methods import PARKED

FEW = 20  # samples: an interval that is resampled from fewer is too narrow
Shown = Mapping[str, Any]


def markdown(summary: Shown) -> str:
    """The whole summary: one table per task, one line per method and budget."""
    given = {name: value for name, value in summary["about"].items() if value is not None}
    about = ", ".join(f"{name} {value}" for name, value in given.items())
    parts = ["# What pruning loses", about]
    for name, task in summary["tasks"].items():
        parts += [f"## {name}", _head(task), "\n".join(_table(task))]
        if any(PARKED in row["method"] for row in task["settings"]):
            parts.append(
                "Where the name of a method has a +, kept is its device bytes over the bytes of "
                "the full vision K/V. What recall parks in main memory is not counted."
            )
        parts += [f"Could not run: {reason}" for reason in _skipped(task)]
    return "\n\n".join(parts) + "\n"


def _head(task: Shown) -> str:
    apart = ""
    if task["one_token"]:
        apart = f" Not included: {counted(task['one_token'], 'answer')} of one token."
    if task["samples"] < FEW:
        apart += f" With fewer than {FEW} samples, intervals and verdicts mean little."
    return (
        f"{task['what']}. {counted(task['samples'], 'sample')}, {task['vision_tokens']:.0f} vision "
        f"tokens and {task['answer_tokens']:.0f} answer tokens on average; "
        f"score: {task['metric']}.{apart}"
    )


def _table(task: Shown) -> Iterator[str]:
    yield (
        "| method | budget | kept | cache bytes | score | of full | random | uniform | agreement | "
        "KL |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in task["settings"]:
        if "skipped" not in row:
            paired = [words(row["paired"].get(name)) for name in ("random", "uniform")]
            cells = [
                row["method"],
                "own" if row["budget"] is None else f"{row['budget']:.0%}",
                f"{row['kept']:.1%}",
                f"{row['kv_bytes'] / row['kv_bytes_full']:.2f}",
                interval(row["score"]),
                interval(row["relative"]),
                *paired,
                number(row["agreement"]),
                number(row["kl"]),
            ]
            yield f"| {' | '.join(cells)} |"


def interval(found: Shown | None, digits: int = 3) -> str:
    """A mean and its interval as "mean [low, high]"; "-" for None."""
    if found is None:
        return "-"
    mean, low, high = (f"{found[name]:.{digits}f}" for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def words(found: Shown | None) -> str:
    """A paired comparison as text: the verdict and the mean difference; "-" for None."""
    return "-" if found is None else f"{found['verdict']} ({found['mean']:+.3f})"


def number(value: float | None) -> str:
    """A number with three decimals; "-" for None."""
    return "-" if value is None else f"{value:.3f}"


def _skipped(task: Shown) -> Sequence[str]:
    """One line per reason, with the settings that could not run for it."""
    reasons: dict[str, list[str]] = {}
    for row in task["settings"]:
        if "skipped" in row:
            budget = "" if row["budget"] is None else f" at {row['budget']:g}"
            reasons.setdefault(row["skipped"], []).append(f"{row['method']}{budget}")
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
