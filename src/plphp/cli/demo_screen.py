"""The screen of `plphp demo`: one line a way, the best of each column, and when to take which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from plphp.cli.demo_run import Result

MIB = 2**20
Number = Callable[[Result], float]


class Column(NamedTuple):
    """A column of the screen.

    number: what is compared; text: a cell; digits: of a time, which is shown over the full cache's;
    more: whether more is better
    """

    head: str
    number: Number
    text: Callable[[Result], str]
    digits: int | None = None
    more: bool = False


COLUMNS = (
    Column("vision K/V\non device", lambda r: r.on_device, lambda r: f"{r.on_device:.0%}"),
    Column("KV MiB", lambda r: r.kv_bytes, lambda r: f"{r.kv_bytes / MIB:,.1f}"),
    Column("ms a token", lambda r: r.step_ms, lambda r: f"{r.step_ms:,.1f}", digits=1),
    Column("first token, ms", lambda r: r.first_ms, lambda r: f"{r.first_ms:,.0f}", digits=0),
)


def table(results: Sequence[Result], known: bool) -> Table:
    """One line a way, with ratios to the full cache; the best of a column has a star.

    known: whether right answers are known; otherwise those of the full cache count as right
    """
    count = results[0].questions
    head = f"right\nof {count}" if known else f"same as\nfull of {count}"
    right = Column(head, lambda r: r.right, lambda r: f"{r.right}", more=True)
    columns = (right, *COLUMNS)
    shown = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)
    shown.add_column("", no_wrap=True)
    for column in columns:
        shown.add_column(column.head, justify="right", no_wrap=True)
    cells = [_cells(column, results) for column in columns]
    for result, *row in zip(results, *cells, strict=True):
        shown.add_row(result.name, *row)
    return shown


def _cells(column: Column, results: Sequence[Result]) -> list[Text]:
    best = column.text((max if column.more else min)(results, key=column.number))
    cells = []
    for result in results:
        number, ratio = column.text(result), ""
        if column.digits is not None:
            share = over(column.number(result), column.number(results[0]), column.digits)
            ratio = f" ({share:.2f})"
        star = number == best
        cells.append(Text(f"{number}{ratio}{'*' if star else ' '}", "bold" if star else ""))
    return cells


def over(time: float, full: float, digits: int) -> float:
    """A time over the full cache's, both as they are shown, so that a reader can divide them.

    digits: decimals that are shown. A time of the full cache that is shown as 0 is not rounded
    """
    shown = round(full, digits)
    return round(time, digits) / shown if shown else time / full


def advice(results: Sequence[Result], known: bool) -> str:
    """When to take which way, as far as these numbers say it.

    results: the full cache, then the other ways
    known: as for `table`
    """
    full, *others = results
    if not full.right:
        return f"Nothing follows from these answers: the full cache has {_right(full, known)}."
    small = min(
        (r for r in others if r.right >= full.right and r.kv_bytes < full.kv_bytes),
        key=lambda r: (r.kv_bytes, -r.right),
        default=None,
    )
    return f"{_for_memory(full, others, small, known)} {_for_speed(full, others, small, known)}"


def _for_memory(full: Result, others: Sequence[Result], small: Result | None, known: bool) -> str:
    if small is not None:
        many = "as many as" if small.right == full.right else "more than"
        beside = f", {many} with the full cache," if known else ","
        return (
            f"For memory take {small.name}: {_right(small, known)}{beside} in "
            f"{small.kv_bytes / full.kv_bytes:.2f} of its bytes."
        )
    near = max(others, key=lambda r: (r.right, -r.kv_bytes))
    if near.right >= full.right:
        return "For memory take the full cache: no way with as many answers takes fewer bytes."
    if not near.right:
        return f"Keep the full cache: every other way has {_right(near, known)}."
    return (
        f"Keep the full cache where every answer counts: {near.name} comes next, with "
        f"{_right(near, known)} in {near.kv_bytes / full.kv_bytes:.2f} of the bytes."
    )


def _for_speed(full: Result, others: Sequence[Result], small: Result | None, known: bool) -> str:
    fast = min(others, key=lambda r: r.step_ms)
    ratio = f"{over(fast.step_ms, full.step_ms, 1):.2f}"
    time = f"{ratio} of the full cache's time a token"
    if float(ratio) >= 1:
        return "For speed take the full cache: no other way decodes faster."
    if fast is small:
        return f"It is also the fastest, with {time}."
    if not fast.right:
        return f"The fastest is {fast.name}, with {time}."
    if fast.right >= full.right:
        return f"For speed take {fast.name}: {_right(fast, known)}, and {time}."
    return (
        f"The fastest is {fast.name}, with {time}, but only {_right(fast, known)}: take it only "
        "where your own questions keep their answers."
    )


def _right(result: Result, known: bool) -> str:
    what = "right" if known else "as with the full cache"
    return f"{result.right or 'none'} of {result.questions} answers {what}"
