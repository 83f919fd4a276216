"""docs/support.md: written from the results of all cells, and read back to be held against them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import torch
import transformers
from circumstances import CIRCUMSTANCES, COLUMNS, OTHERS
from methods import METHODS, OPTIONS
from modes import MODES

import tiny

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
WORKS, NOT_APPLICABLE = "works", "not applicable"
OR = " / "  # where policies differ
LINES = [*tiny.FAMILIES, *tiny.DECODERS, *tiny.REFUSED]


@dataclass
class Results:
    """What each (family, mode) said, one entry a policy, and the time of all cells."""

    said: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    cells: int = 0
    seconds: float = 0.0

    def note(self, family: str, mode: str, result: str) -> None:
        self.said.setdefault((family, mode), set()).add(result)

    def cell(self, family: str, mode: str) -> list[str]:
        everything = "" if family in tiny.REFUSED else mode
        return sorted(self.said.get((family, everything), {NOT_APPLICABLE}))


@dataclass
class Notes:
    """Reasons, as footnotes of both tables."""

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


def first_table(results: Results, notes: Notes) -> list[str]:
    """One line a family."""
    lines = [
        [f"`{family}`", *(notes.short(results.cell(family, mode)) for mode in MODES)]
        for family in LINES
    ]
    return rows(["family", *MODES], lines)


def second_table(results: Results, notes: Notes) -> list[str]:
    """One line a mode."""
    lines = [
        [mode, *(notes.short(results.cell(family, mode)) for family in COLUMNS)]
        for mode in CIRCUMSTANCES
    ]
    return rows(["mode", *(f"`{family}`" for family in COLUMNS)], lines)


def page(results: Results) -> str:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    made = (
        f"{results.cells} cells in {results.seconds:.0f} s, none failed: {versions},\n"
        f"{torch.get_num_threads()} CPU threads, {date.today().isoformat()}."
    )
    notes = Notes()
    tables = [first_table(results, notes), second_table(results, notes)]
    return TEXT.format(
        *("\n".join(table) for table in tables),
        notes="\n".join(notes.numbered()),
        made=made,
        policies=", ".join(OPTIONS),
        sampled=", ".join(name for name in METHODS if name not in OPTIONS),
        others=", ".join(OTHERS),
    )


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

## Notes

{notes}

{made}
"""


def shown() -> dict[tuple[str, str], list[str]]:
    """(family, mode) -> what the page says, reasons in place of their numbers."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if re.match(r"\d+\. ", line))

    def whole(cell: str) -> list[str]:
        parts = cell.split(OR)
        return [re.sub(r" \((\d+)\)$", lambda m: f": {reasons[m[1]]}", part) for part in parts]

    found: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        name, *cells = line.strip("| ").split(" | ")
        if line.startswith("| `"):
            keys = [(name.strip("`"), mode) for mode in MODES]
        elif line.startswith("| ") and name in CIRCUMSTANCES:
            keys = [(family, name) for family in COLUMNS]
        else:
            continue
        found |= zip(keys, map(whole, cells), strict=True)
    return found
