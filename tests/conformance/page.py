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

Each cell is a test of plphp on a tiny random model of the real transformers class, against an
independent oracle: a full cache in which an attention mask hides the dropped tokens. A cell says
"works", "refused" or "not applicable", and a numbered note at the end gives the reason.
`make support` runs `tests/conformance/test_matrix.py` and writes this page.

## Families and prompts

Cells were run with these policies: {policies}. Each other policy
({sampled})
was run with every family and in every mode, in at least one cell.

{0}

- Every cell with images checks that the spans are right, that selection and decoding equal the
  oracle's, that a policy that keeps everything gives the tokens of the unpruned model, that a row
  of a padded batch equals the row alone, and that the model is unchanged afterwards. Cells with
  beams, samples and chunks check that keeping everything changes no token, and that the selection
  is the oracle's.
- `internvl` and `smolvlm` mark the frames of a video as they mark images. Each frame counts as an
  image, and the report says so; `plphp.prune(model, vision_mask=...)` makes them one video.
- `gemma3` and `cohere2_vision` have layers with a sliding window. If a prompt is longer than the
  window, these layers are not pruned, and the report names them. The same holds for linear,
  convolutional and chunked layers, and for layers that share keys. The `llava + ...` lines are the
  LLaVA class with such decoders; they were run with plphp only.
- For a class that is not listed, the image token id of the config says which tokens are vision
  tokens, and each unbroken run of them is one image. Without an image token id it is refused.

## Ways to run a model

These families differ in positions, masks, image tokens or kinds of layers. Every cell was run with
plphp, and every mode also with one policy of each other kind ({others}).

{1}

- Greedy modes: a policy that keeps everything gives the tokens of the unpruned model. With pruning,
  the selection and all tokens are the oracle's.
- Later turns: the oracle computes the whole conversation at once and hides from each turn the
  tokens that earlier turns dropped. Selection, logits and tokens of every turn equal the oracle's,
  also if the cache is saved, moved, cropped or reordered between turns.
- Other weights, dtypes, attention implementations and devices: selection and logits are within 1e-4
  of the oracle's. For bfloat16 and float16 the tolerances are .5 and .05, and tokens are equal
  wherever the oracle's two highest logits differ by more. For mixtures of experts in half precision
  the median over steps counts, because rounding changes which experts are used.
- The FlashAttention cells use a function in torch in place of the kernel; names, layouts, windows
  and masks are those of transformers. int8 weights are torchao's. `device_map` puts every other
  layer on the disk. Tensor parallel runs two gloo processes.
- "The unpruned model" in a note: the same mode was run without plphp, and failed or gave other
  logits than a plain forward.

## With recall

[Recall](recall.md) parks the tokens that a policy drops; 40 % of the bytes stay on the device.
Every cell was run with plphp, and every other policy in at least one cell.

{2}

{3}

- Home `host`: the oracle hides, at each step, the tokens that the step did not attend to. Logits
  are within 1e-4 of the oracle's.
- Home `int4`: the oracle rounds the parked tokens. The median over steps is within 1e-4 and every
  step within 5e-3, because a value between two codes may be rounded either way.
- Later turns: the oracle's prompt attends to all images of the conversation, each earlier answer to
  the tokens that it attended to, and rounded tokens stay rounded. Beams are followed from row to
  row.
- The rest is as without recall.

## Notes

{notes}

{made}
"""


def shown() -> dict[Key, list[str]]:
    """The cells of the current page, with reasons in place of the numbers of notes."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))

    def whole(cell: str) -> list[str]:
        parts = cell.split(OR)
        return [re.sub(r" \((\d+)\)$", lambda m: f": {reasons[m[1]]}", part) for part in parts]

    return {key: whole(cell) for table in TABLES for key, cell in table.read(lines)}
