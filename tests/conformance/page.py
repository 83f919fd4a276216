"""docs/support.md: this module writes it from the results of all cells, and reads it for a test."""

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

import torch
import transformers
from circumstances import CIRCUMSTANCES, COLUMNS, FAMILIES, OTHERS, PLAIN, RECALLED
from methods import HOMES, METHODS, OPTIONS
from modes import MODES
from overview import HEAD, exceptions
from page_text import TEXT

import tiny

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
WORKS, NOT_APPLICABLE = "works", "not applicable"
OR = " / "  # where policies differ
LINES = [*FAMILIES, *tiny.REFUSED]
EVERY_MODE = (*MODES, *CIRCUMSTANCES)

Key = tuple[str, str, str]  # family, mode, home of recall


def _of_results(key: Sequence[str]) -> Key:
    """The key of a result. A refused family has one result for all modes."""
    family, mode, home = key
    return family, "" if family in tiny.REFUSED and not home else mode, home


@dataclass
class Results:
    """The results of all cells.

    said: results by key; they may differ between policies
    cells, seconds: number of cells and their time, without recall (False) and with recall (True)
    """

    said: dict[Key, set[str]] = field(default_factory=dict)
    cells: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    seconds: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def note(
        self, family: str, mode: str, result: str, home: str = "", seconds: float = 0.0
    ) -> None:
        self.said.setdefault((family, mode, home), set()).add(result)
        if seconds:
            self.cells[bool(home)] += 1
            self.seconds[bool(home)] += seconds

    def cell(self, *key: str) -> list[str]:
        return sorted(self.said.get(_of_results(key), {NOT_APPLICABLE}))


@dataclass
class Notes:
    """The reasons of refused and not applicable cells, which are notes shared by all tables."""

    texts: list[str] = field(default_factory=list)

    def short(self, cell: list[str]) -> str:
        parts = []
        for part in cell:
            said, _, reason = part.partition(": ")
            if reason and reason not in self.texts:
                self.texts.append(reason)
            parts.append(f"{said} ({self.texts.index(reason) + 1})" if reason else said)
        return OR.join(parts)

    def numbered(self) -> list[str]:
        return [f"{number}. {text}" for number, text in enumerate(self.texts, start=1)]


def rows(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    every = [head, ["---"] * len(head), *lines]
    return [f"| {' | '.join(line)} |" for line in every]


def code(names: Iterable[str]) -> dict[str, str]:
    return {f"`{name}`": name for name in names}


REFUSED = code(tiny.REFUSED)


@dataclass(frozen=True)
class Table:
    """One table of the page.

    head: text of its first header cell
    lines, columns: from the text that is shown to the part of the key
    key: function from a line and a column to the key of the cell
    """

    head: str
    lines: dict[str, str]
    columns: dict[str, tuple[str, str]]
    key: Callable[[str, tuple[str, str]], Key]

    def text(self, results: Results, notes: Notes) -> str:
        lines = [
            [shown, *(notes.short(results.cell(*self.key(line, c))) for c in self.columns.values())]
            for shown, line in self.lines.items()
        ]
        return "\n".join(rows([self.head, *self.columns], lines))

    def read(self, page: list[str]) -> Iterator[tuple[Key, str]]:
        """The text of each cell of the table in a page."""
        below = itertools.dropwhile(lambda line: not line.startswith(f"| {self.head} |"), page)
        for line in itertools.islice(itertools.takewhile(str.strip, below), 2, None):
            name, *cells = line.strip("| ").split(" | ")
            for column, cell in zip(self.columns.values(), cells, strict=True):
                yield self.key(self.lines[name], column), cell


TABLES = (
    Table(
        "family",
        code(LINES),
        {mode: (mode, "") for mode in MODES},
        lambda family, column: (family, *column),
    ),
    Table(
        "mode",
        {mode: mode for mode in CIRCUMSTANCES},
        {shown: (family, "") for shown, family in code(COLUMNS).items()},
        lambda mode, column: (column[0], mode, column[1]),
    ),
    Table(
        "with recall",
        {mode: mode for mode in EVERY_MODE},
        {f"`{family}`, {home}": (family, home) for family in RECALLED for home in HOMES},
        lambda mode, column: (column[0], mode, column[1]),
    ),
    Table(
        f"{PLAIN}, with recall",
        code(FAMILIES),
        {home: (PLAIN, home) for home in HOMES},
        lambda family, column: (family, *column),
    ),
)


def every_key() -> set[Key]:
    return {
        table.key(line, column)
        for table in TABLES
        for line in table.lines.values()
        for column in table.columns.values()
    }


def page(results: Results, whole: set[bool]) -> str:
    """The page with new results.

    whole: whether the results are complete without recall (False), with recall (True). The other
        cells are taken from the current page.
    """
    made = [written(recall, results) if recall in whole else before(recall) for recall in (0, 1)]
    said = results.said
    if len(whole) < 2:
        kept = (item for item in shown().items() if bool(item[0][2]) not in whole)
        said = {_of_results(key): set(cell) for key, cell in kept} | said
    every, notes = replace(results, said=said), Notes()
    tables = [table.text(every, notes) for table in TABLES]  # this fills `notes`
    return TEXT.format(
        *tables,
        overview=overview(every, notes),
        notes="\n".join(notes.numbered()),
        made="\n".join(made),
        policies=", ".join(OPTIONS),
        sampled=", ".join(name for name in METHODS if name not in OPTIONS),
        others=", ".join(OTHERS),
    )


def overview(results: Results, notes: Notes) -> str:
    """The families, and the modes of the first three tables in which some of them do not work."""

    def cells(mode: str, columns: dict[str, tuple[str, str]]) -> dict[str, str]:
        return {
            shown: notes.short(results.cell(family, mode, home))
            for shown, (family, home) in columns.items()
        }

    pruned = {shown: (name, "") for shown, name in code(FAMILIES).items()}
    some = {shown: (name, "") for shown, name in code(COLUMNS).items()}
    table = {mode: cells(mode, pruned) for mode in MODES}
    table |= {mode: cells(mode, some) for mode in CIRCUMSTANCES}
    without = {shown: (family, "") for shown, (family, _) in TABLES[2].columns.items()}
    table |= {
        f"{mode}, with recall": cells(mode, TABLES[2].columns)
        for mode in EVERY_MODE
        if cells(mode, TABLES[2].columns) != cells(mode, without)
    }
    refused = (f"{shown}: {cells('', {'': (name, '')})['']}" for shown, name in REFUSED.items())
    return (
        f"**{len(pruned)} families are pruned**: {', '.join(pruned)}.\n\n"
        f"**{len(REFUSED)} are refused**: {', '.join(refused)}.\n\n"
        f"Every family works in every mode, but for these:\n\n{HEAD}"
        + "".join(exceptions(table, WORKS))
    )


def written(recall: bool, results: Results) -> str:
    return (
        f"{_how(recall)} {results.cells[recall]} cells in {results.seconds[recall]:.0f} s, none "
        f"failed: transformers {transformers.__version__}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, {date.today().isoformat()}."
    )


def before(recall: bool) -> str:
    return next(line for line in PAGE.read_text().splitlines() if line.startswith(_how(recall)))


def _how(recall: bool) -> str:
    return f"- {'With' if recall else 'Without'} recall:"


def shown() -> dict[Key, list[str]]:
    """The cells of the current page, with reasons in place of the numbers of notes."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))

    def whole(cell: str) -> list[str]:
        parts = cell.split(OR)
        return [re.sub(r" \((\d+)\)$", lambda m: f": {reasons[m[1]]}", part) for part in parts]

    return {key: whole(cell) for table in TABLES for key, cell in table.read(lines)}
