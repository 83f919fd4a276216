"""Write the tables of five pages from the results in docs/accuracy: `make regimes-page`.

docs/regimes.md compares all methods, and docs/stages-results.md those that act before the model
(regimes.json). docs/choosing.md has what a user chooses from (ways.json: few methods, more
samples), docs/small-devices-results.md tokens in few bits (bits.json), and docs/stages-video.md
clips (video.json).
The column "first token" is that of first-token.json (dev/studies/first_token_time.py).

With --regimes DIR, the directory of a finished `plphp eval`, the results of regimes.json are copied
first; with --ways, --bits and --video DIR, those of the other files. With --more DIR, regimes.json
gets the results that it lacks, and keeps the others.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from regime_results import (
    BITS,
    DOCS,
    FIRST_TOKEN,
    RESULTS,
    VIDEO,
    WAYS,
    Row,
    Rows,
    add,
    measured,
    of_full,
    runs_of,
    take_in,
    timed_on,
    times,
)

BEGIN, END = "<!-- by docs/make_regimes.py -->\n", "<!-- end -->"
SUITES = ("dense", "redundant-4", "redundant-16")
TASKS = ("describe", "grid", "refer", "second", "what")
VIDEO_TASKS = ("describe", "once", "refer", "second", "what")
CONTROLS = ("full", "random", "uniform")
NAMES = {
    "plphp:paper": "PLPHP() as published",
    "plphp": "PLPHP",
    "novelty": "novelty (recommended)",
    "novelty+host": "novelty, recall `host`",
    "novelty+int4": "novelty, recall `int4`",
    "plphp+host": "PLPHP, recall `host`",
    "plphp+kv4": "PLPHP, 4 bits",
    "plphp+kv2": "PLPHP, 2 bits",
    "novelty+kv4": "novelty, 4 bits",
    "novelty+kv2": "novelty, 2 bits",
    "full+int4": "all tokens, 4 bits",
    "full+int2": "all tokens, 2 bits",
    "divprune/novelty+int4": "divprune/novelty, recall `int4`",
    "vidcom2/novelty+int4": "vidcom2/novelty, recall `int4`",
}

Tasks = Mapping[str, Sequence[str]]  # tasks by the heading of their column


@dataclass(frozen=True)
class Page:
    """A page with tables.

    file: its name in docs/
    methods: the methods of its tables, besides the controls
    budgets: the budgets of its tables; rows without a budget always belong to them
    tables: the columns of each table, by the line that it is folded under; "": it is not folded
    overview: the columns of a table before them, with the first of the budgets only
    results: the file with its results
    timed: the line over the one table that also has the time to the first token
    """

    file: str
    methods: Sequence[str]
    budgets: Sequence[float]
    tables: Mapping[str, Tasks]
    overview: Tasks = field(default_factory=dict)
    results: Path = RESULTS
    timed: str | None = None

    def shows(self, row: Row) -> bool:
        """Whether a row belongs to the tables."""
        return fits(row, self.budgets) and row["method"] in (*CONTROLS, *self.methods)

    def write(self, text: str, found: Mapping[str, Any]) -> str:
        """The page's text with the tables of the results in it, and what they were measured on."""
        rows = [row for row in found["rows"] if self.shows(row)]
        first = [row for row in rows if fits(row, self.budgets[:1])]
        made = f"{table(first, self.overview)}\n\n" if self.overview else ""
        for name, tasks in self.tables.items():
            made += folded(name, table(rows, tasks, times() if name == self.timed else None))
        shown = {
            task for tasks in self.tables.values() for names in tasks.values() for task in names
        }
        said = "".join(measured(about) for about in runs_of(found, rows, shown))
        if self.timed is not None:
            said += timed_on(json.loads(FIRST_TOKEN.read_text())["about"])
        pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
        whole = f"{BEGIN}{made}{said}{END}"
        return re.sub(pattern, lambda _: whole, text, flags=re.S)


def fits(row: Row, budgets: Sequence[float]) -> bool:
    """Whether a row has one of the budgets, or no budget at all."""
    return row["budget"] is None or row["method"] == "full" or row["budget"] in budgets


def folded(name: str, made: str) -> str:
    """A table, folded under a line if that is not empty."""
    if not name:
        return f"{made}\n\n"
    return f'<details markdown="1">\n<summary>{name}</summary>\n\n{made}\n\n</details>\n\n'


def each_task(suite: str) -> Tasks:
    """One column for each task of a suite."""
    return {task: (f"{task}@{suite}",) for task in TASKS}


def everywhere(**columns: Sequence[str]) -> Tasks:
    """Columns of tasks, each the mean over all suites."""
    return {
        name.replace("_", " "): tuple(f"{task}@{suite}" for task in tasks for suite in SUITES)
        for name, tasks in columns.items()
    }


def methods(text: str) -> tuple[str, ...]:
    """The methods that a text names, with spaces between them."""
    return tuple(text.split())


PAGES = (
    Page(
        "choosing.md",
        ("plphp:paper", "plphp", "novelty", "novelty+host", "novelty+int4"),
        (0.4,),
        {
            "": everywhere(
                long_answers=("describe",),
                a_page_read_word_by_word=("grid",),
                short_answers=("what", "refer"),
                a_second_question=("second",),
            )
        },
        results=WAYS,
    ),
    Page(
        "regimes.md",
        methods(
            "plphp:paper plphp plphp-shared snapkv vl-cache novelty tgv-kv divprune "
            "downsample divprune/novelty novelty+host novelty+int4 plphp+host cdpruner "
            "dart visionzip divprune/plphp visionzip/novelty divprune/novelty+int4"
        ),
        (0.4, 0.2),
        {f"{suite}, each task, with 40 % and 20 %": each_task(suite) for suite in SUITES},
        {f"{suite}, all tasks": [f"{task}@{suite}" for task in TASKS] for suite in SUITES},
    ),
    Page(
        "stages-results.md",
        methods(
            "downsample plphp novelty divprune cdpruner dart visionzip divprune/plphp "
            "divprune/novelty visionzip/novelty divprune/novelty+int4"
        ),
        (0.4, 0.2),
        {"": each_task("redundant-4")},
        timed="",
    ),
    Page(
        "stages-video.md",
        methods(
            "downsample plphp novelty vidcom2 divprune dart visionzip vidcom2/plphp "
            "vidcom2/novelty divprune/novelty novelty+host novelty+int4 "
            "vidcom2/novelty+int4"
        ),
        (0.4, 0.2),
        {"": {task: (f"{task}@video",) for task in VIDEO_TASKS}},
        results=VIDEO,
    ),
    Page(
        "small-devices-results.md",
        methods(
            "plphp plphp+kv4 plphp+kv2 novelty novelty+kv4 novelty+kv2 full+int4 "
            "full+int2 novelty+host"
        ),
        (0.13, 0.07),
        {"": each_task("redundant-4")},
        results=BITS,
    ),
)


def table(
    rows: Rows, tasks: Tasks, first: Mapping[tuple[str, float | None], float] | None = None
) -> str:
    """The settings in rows: the larger budget first, then by the mean over the columns.

    first: the time to the first token of each setting, for a column of its own

    A setting without results for all tasks is left out.
    """
    every = [task for names in tasks.values() for task in names]
    complete = [row for row in rows if set(every) <= set(row["right"])]

    def place(row: Row) -> tuple[float, float]:
        columns = [_mean(row, "right", names) for names in tasks.values()]
        return -(row["budget"] or _mean(row, "kept", every)), -mean(columns)

    before = "| method | kept | cache bytes |" + ("" if first is None else " first token |")
    lines = [
        before + "".join(f" {name} |" for name in tasks),
        "|" + "---|" * (before.count("|") - 1 + len(tasks)),
    ]
    for row in sorted(complete, key=place):
        name = NAMES.get(row["method"], row["method"])
        right = "".join(f" {_mean(row, 'right', names):.2f} |" for names in tasks.values())
        kept, size = _mean(row, "kept", every), _mean(row, "bytes", every)
        time = "" if first is None else f" {_time(first, row)} |"
        lines.append(f"| {name} | {kept:.0%} | {size:.2f} |{time}{right}")
    return "\n".join(lines)


def _time(first: Mapping[tuple[str, float | None], float], row: Row) -> str:
    """The time to the first token of a row; recall changes no time before it."""
    name = row["method"].partition("+")[0]
    found = first.get((row["method"], row["budget"]), first.get((name, row["budget"])))
    return "" if found is None else f"{found:.2f}"


def _mean(row: Row, what: str, tasks: Sequence[str]) -> float:
    return mean(row[what][task] for task in tasks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    files = (VIDEO, BITS, WAYS, RESULTS)
    for file in files:
        parser.add_argument(f"--{file.stem}", type=Path)
    parser.add_argument("--more", type=Path)
    given = parser.parse_args()
    for file in files:
        if run := getattr(given, file.stem):
            file.write_text(json.dumps(take_in(run), indent=1) + "\n")
    if given.more:
        whole = add(json.loads(RESULTS.read_text()), take_in(given.more))
        RESULTS.write_text(json.dumps(whole, indent=1) + "\n")
    for page in PAGES:
        path = DOCS / page.file
        path.write_text(page.write(path.read_text(), json.loads(page.results.read_text())))
    for file in files:
        print(file.name)
        rows = json.loads(file.read_text())["rows"]
        for row in rows:
            low, high = of_full(rows, row["method"], row["budget"])
            print(f"{row['method']} {row['budget']}: {low:.2f} to {high:.2f} of the full cache")


if __name__ == "__main__":
    main()
