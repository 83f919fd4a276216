"""docs/support.md: written from the results of all cells, and read back to be held against them."""

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

import tiny

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
WORKS, NOT_APPLICABLE = "works", "not applicable"
OR = " / "  # where policies differ
LINES = [*FAMILIES, *tiny.REFUSED]
EVERY_MODE = (*MODES, *CIRCUMSTANCES)

Key = tuple[str, str, str]  # family, mode, home of recall


def _of_results(key: Sequence[str]) -> Key:
    """What a refused family says, it says once for all modes."""
    family, mode, home = key
    return family, "" if family in tiny.REFUSED and not home else mode, home


@dataclass
class Results:
    """What each key said, one entry a policy.

    cells, seconds: how many ran without and with recall, and how long
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
    """Reasons, as footnotes of all tables."""

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


@dataclass(frozen=True)
class Table:
    """Lines and columns by what they show, and the key of a cell."""

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
        """Every cell of the table in a page, as it is written."""
        below = itertools.dropwhile(lambda line: not line.startswith(f"| {self.head} |"), page)
        for line in itertools.islice(itertools.takewhile(str.strip, below), 2, None):
            name, *cells = line.strip("| ").split(" | ")
            for column, cell in zip(self.columns.values(), cells, strict=True):
                yield self.key(self.lines[name], column), cell


def code(names: Iterable[str]) -> dict[str, str]:
    return {f"`{name}`": name for name in names}


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
    """The page from results without recall, with recall, or both; the rest stays as it is."""
    made = [written(recall, results) if recall in whole else before(recall) for recall in (0, 1)]
    said = results.said
    if len(whole) < 2:
        kept = (item for item in shown().items() if bool(item[0][2]) not in whole)
        said = {_of_results(key): set(cell) for key, cell in kept} | said
    every, notes = replace(results, said=said), Notes()
    tables = [table.text(every, notes) for table in TABLES]  # which write the notes
    return TEXT.format(
        *tables,
        notes="\n".join(notes.numbered()),
        made="\n".join(made),
        policies=", ".join(OPTIONS),
        sampled=", ".join(name for name in METHODS if name not in OPTIONS),
        others=", ".join(OTHERS),
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


TEXT = """# What is supported

`make support` makes this page from a run of `tests/conformance/test_matrix.py`: tiny random models
of the real transformers classes, against an independent oracle. No cell is empty: what does not
work is refused, or not applicable, with the reason in a note.

## Families and prompts

A cell says "works" when it does so under all of: {policies}.
Of the other policies ({sampled})
every one meets every family and every mode in some cell.

{0}

- Checked in every cell with images: images are counted as a person counts them, selection and
  decoding equal the oracle's, keeping all equals the untouched model, a row of a padded batch
  equals the row alone, and the model is afterwards as it was. Beams, samples and chunks: keeping
  all changes no token, and the selection is the oracle's.
- `internvl` and `smolvlm` write the frames of a video as they write images, and nothing in the
  prompt's tensors tells them apart: each frame counts as an image, and the report says so.
  `plphp.prune(model, vision_mask=...)` makes them one video.
- `gemma3` and `cohere2_vision` have sliding-window layers. Where a prompt is longer than their
  window they are left alone and the report names them; the full-attention layers are pruned. So it
  is with linear, convolutional and chunked layers, and with layers whose keys others share: the
  `llava + ...` lines are the LLaVA class around such decoders, under plphp alone.
- Classes that are not listed are found by their config's image token id, every unbroken run of
  those tokens an image, or refused.

## Ways to run a model

On families that differ in positions, masks, image tokens or kinds of layers; under plphp in every
cell, and in every mode under one policy of each other kind ({others}).

{1}

- Greedy modes: keeping all gives the untouched model's tokens; pruned, the selection is the
  oracle's and so is every token that follows from it.
- Later turns: the oracle reads the whole conversation at once, with what earlier turns dropped
  hidden from later ones; selection, logits and tokens of every turn are its. What is done to a
  cache between two turns must not be noticed by the second.
- Other weights, numbers, attention and places: selection and logits within 1e-4 of the oracle's;
  bfloat16 and float16 within .5 and .05, and equal tokens wherever the oracle's lead is larger.
  Of mixtures of experts in half precision the median step: rounding decides who is asked.
- FlashAttention's kernels are stood in for by a function in torch: names, layouts, windows and
  masks are transformers' own. int8 weights are torchao's; `device_map` has every other layer on
  the disk; tensor parallel runs two gloo processes.
- "transformers itself" in a note: the same was tried on the untouched model and fails there, or
  gives other logits than reading the prompt plainly does.

## With recall

What a policy drops is [parked](recall.md), 40 % of the bytes are left on the device. Under plphp,
and on some family under every other policy.

{2}

{3}

- The oracle holds a full cache and hides at each step what the step did not read (`host`), or
  rounds what is in codes (`int4`): logits within 1e-4 of it, or with codes the median and 5e-3 at
  most, because a number between two codes goes either way. Beams are followed from row to row.
- Later turns: the oracle's prompt sees every image of the conversation, each earlier answer what it
  read, and what was in codes stays rounded.
- Otherwise as without recall.

## Notes

{notes}

{made}
"""


def shown() -> dict[Key, list[str]]:
    """What the page says, reasons in place of their numbers."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))

    def whole(cell: str) -> list[str]:
        parts = cell.split(OR)
        return [re.sub(r" \((\d+)\)$", lambda m: f": {reasons[m[1]]}", part) for part in parts]

    return {key: whole(cell) for table in TABLES for key, cell in table.read(lines)}
