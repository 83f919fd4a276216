"""What `plphp demo --details` adds: answers side by side, regimes, layers, costs, hard cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from rich.table import Table
from rich.text import Text

from plphp.cli.console import shown
from plphp.cli.demo_run import Asked
from plphp.report import Report


def tables(asked: Sequence[Asked], pruned: str) -> list[Table]:
    """The tables in their order. pruned: name of the way with PLPHP's layers, which has reports"""
    longest = max(asked, key=lambda a: sum(_report(a, pruned).prompt))
    regimes = [_regimes(asked)] if len({a.item.regime for a in asked}) > 1 else []
    return [_answers(asked), *regimes, _layers(longest, pruned), _costs(asked, pruned)]


def hard_cases(asked: Sequence[Asked]) -> list[str]:
    """A line for each way on the questions whose answers it changed for the worse.

    A line compares the lengths of the answers that were lost and kept, in words.
    """
    full, *others = asked[0].answers
    lines = []
    for name in others:
        known = [a for a in asked if a.right(full)]
        lost = [a for a in known if not a.right(name)]
        if not lost:
            continue
        tasks = Counter(a.item.task for a in lost)
        which = ", ".join(f"{task} ({n})" if n > 1 else task for task, n in sorted(tasks.items()))
        line = f"{name} lost {len(lost)} of {len(known)} answers: {which}."
        if len(lost) < len(known):
            kept = [a for a in known if a.right(name)]
            line += f" Lost answers have {_words(lost)} words, kept ones {_words(kept)} (median)."
        lines.append(line)
    return lines


def not_read(asked: Sequence[Asked]) -> str | None:
    """A line on the regimes in which the full cache has less than half of the answers right."""
    full = next(iter(asked[0].answers))
    counts = Counter(a.item.regime for a in asked)
    right = Counter(a.item.regime for a in asked if a.right(full))
    weak = [f"{name} ({right[name]} of {n})" for name, n in counts.items() if 2 * right[name] < n]
    if not weak:
        return None
    return (
        f"This model itself, with the full cache, does not read pictures of {' and '.join(weak)}. "
        "What is lost there says little about pruning."
    )


def _words(asked: Sequence[Asked]) -> str:
    return f"{median(len(a.wanted.split()) for a in asked):g}"


def _report(asked: Asked, pruned: str) -> Report:
    report = asked.answers[pruned].report
    assert report is not None
    return report


def _answers(asked: Sequence[Asked]) -> Table:
    table = Table(title="Answers: underlined words differ")
    table.add_column("#", justify="right")
    table.add_column("way")
    table.add_column("answer", overflow="fold")
    for number, a in enumerate(asked, start=1):
        known = a.item.expected is not None
        names, texts = ["question"], [Text(f"{shown(a.item.question)} {_pictures(a)}")]
        if known:
            names.append("expected")
            texts.append(Text(shown(a.wanted)))
        for name, answer in a.answers.items():
            first = not known and name == next(iter(a.answers))
            names.append(name)
            same = "right" if known else "the same"
            texts.append(Text(shown(answer.text)) if first else mark(answer.text, a.wanted, same))
        for i, (name, text) in enumerate(zip(names, texts, strict=True)):
            table.add_row(str(number) if i == 0 else "", name, text, end_section=name == names[-1])
    return table


def _pictures(asked: Asked) -> str:
    count = len(asked.item.images)
    regime = "" if asked.item.expected is None else f", {asked.item.regime}"
    return f"({count} picture{'s' if count > 1 else ''}{regime})"


def mark(answer: str, wanted: str, same: str = "right") -> Text:
    """The word `same` in green, or another answer in red with each other word underlined."""
    if answer == wanted:
        return Text(same, style="green")
    expected = wanted.split()
    words = [
        Text(shown(word), style="" if expected[i : i + 1] == [word] else "underline")
        for i, word in enumerate(answer.split())
    ]
    marked = Text(" ").join(words) if words else Text("(nothing)", style="underline")
    marked.stylize("red")
    return marked


def _regimes(asked: Sequence[Asked]) -> Table:
    """Right answers by how many vision tokens a thing covers."""
    table = Table(title="Right answers by regime: dense is one vision token a thing")
    counts = Counter(a.item.regime for a in asked)
    table.add_column("way")
    for regime, count in counts.items():
        table.add_column(f"{regime}, of {count}", justify="right")
    for name in asked[0].answers:
        right = Counter(a.item.regime for a in asked if a.right(name))
        table.add_row(name, *(str(right[regime]) for regime in counts))
    return table


def _layers(asked: Asked, pruned: str) -> Table:
    table = Table(title=f"Layers under {pruned}, for: {shown(asked.item.question)} "
                        f"{_pictures(asked)}")  # fmt: skip
    for name in ("layer", "gamma", "class", "rate", "kept tokens a head", "K/V kept"):
        table.add_column(name, justify="right")
    for layer in _report(asked, pruned).layers:
        kept = int((layer.kept[0] >= 0).sum()) // max(layer.kept.shape[1], 1)
        table.add_row(
            str(layer.layer),
            f"{layer.gamma[0]:.3f}",
            layer.layer_class[0] or "-",
            f"{layer.rate[0]:.2f}",
            f"{kept} of {layer.vision[0]}",
            f"{layer.retention:.0%}",
        )
    return table


def _costs(asked: Sequence[Asked], pruned: str) -> Table:
    table = Table(title=f"Each question alone: the full cache and {pruned}, one round")
    for name in ("#", "vision kept", "KV KiB full", "pruned", "ratio"):
        table.add_column(name, justify="right")
    for name in ("ms/token full", "pruned", "first token, ratio"):
        table.add_column(name, justify="right")
    for number, a in enumerate(asked, start=1):
        full, other = next(iter(a.answers.values())).timing, a.answers[pruned].timing
        table.add_row(
            str(number),
            f"{_report(a, pruned).retention:.0%}",
            f"{full.kv_bytes / 1024:,.0f}",
            f"{other.kv_bytes / 1024:,.0f}",
            f"{other.kv_bytes / full.kv_bytes:.2f}",
            f"{full.step_ms:.2f}",
            f"{other.step_ms:.2f}",
            f"{other.first_ms / full.first_ms:.2f}",
        )
    return table
