"""Every family x every policy x every mode: one cell each, and docs/support.md from their results.

The normal run takes the cells that a pairwise sample needs; the others are marked slow. After a run
of all cells, `PLPHP_WRITE_DOCS=1` rewrites the page; every other run is held against it.
"""

import os
import re
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers
from methods import METHODS
from modes import MODES, NotApplicable
from sampling import pairwise

import plphp
import tiny
from invariants import EVERY

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
WORKS, NOT_APPLICABLE = "works", "not applicable"

# What must work: a refusal in one of these cells is a failure. Others may refuse with a reason.
IMAGES = ("one image", "several images", "padded batch")
MUST_WORK: dict[str, tuple[str, ...]] = {
    "qwen2_vl": (*IMAGES, "video"),
    "qwen2_5_vl": (*IMAGES, "video"),
    "qwen3_vl": (*IMAGES, "video"),
    "qwen3_vl_moe": (*IMAGES, "video"),
    "qwen3_5": (*IMAGES, "video"),
    "glm4v": (*IMAGES, "video"),
    "llava": IMAGES,
    "llava_next": IMAGES,
    "llava_onevision": (*IMAGES, "video"),
    "idefics2": IMAGES,
    "idefics3": IMAGES,
    "smolvlm": (*IMAGES, "video"),
    "internvl": (*IMAGES, "video"),
    "ovis2": IMAGES,
    "aya_vision": IMAGES,
    "cohere2_vision": IMAGES,
    "gemma3": IMAGES,
    "paligemma": IMAGES,
    "pixtral": IMAGES,
    "mistral3": IMAGES,
}
APPLICABLE = [
    (name, method, mode.name)
    for name, family in tiny.FAMILIES.items()
    for method in METHODS
    for mode in MODES.values()
    if mode.applies(family)
]
SAMPLE = pairwise(APPLICABLE)
# What a decoder's layers are has nothing to do with how images are cut or policies choose
DECODERS = [
    (name, "plphp", mode.name)
    for name, family in tiny.DECODERS.items()
    for mode in MODES.values()
    if mode.applies(family)
]


@dataclass
class Results:
    """What each (family, mode) said, one entry a policy, and the time of all cells."""

    said: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    cells: int = 0
    seconds: float = 0.0

    def note(self, family: str, mode: str, result: str) -> None:
        self.said.setdefault((family, mode), set()).add(result)


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


NORMAL = {*SAMPLE, *(cell for cell in DECODERS if cell[2] == "padded batch")}
CELLS = [
    pytest.param(
        *cell,
        marks=() if cell in NORMAL else pytest.mark.slow,
        id="-".join(cell).replace(" ", "_"),
    )
    for cell in (*APPLICABLE, *DECODERS)
]


@pytest.mark.parametrize(("family", "method", "mode"), CELLS)
def test_cell(family: str, method: str, mode: str, results: Results) -> None:
    if not EVERY[family].available:
        results.note(family, mode, NOT_APPLICABLE)
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    begin = time.perf_counter()
    try:
        MODES[mode].check(MODES[mode], family, METHODS[method])
        result = WORKS if told(family, mode) else "works, given a `vision_mask`"
    except NotApplicable as reason:
        result = f"{NOT_APPLICABLE}: {reason}"
    except (plphp.UnsupportedModelError, plphp.UnsupportedModeError) as error:
        if mode in MUST_WORK.get(family, ()):
            raise
        result = f"refused: {error}"
    results.note(family, mode, result)
    results.cells += 1
    results.seconds += time.perf_counter() - begin


def told(family: str, mode: str) -> bool:
    return mode != "video" or EVERY[family].videos_told


@pytest.mark.parametrize("name", tiny.REFUSED)
def test_refusal(name: str, results: Results) -> None:
    family = tiny.REFUSED[name]
    if not family.available:
        results.note(name, "", NOT_APPLICABLE)
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(plphp.UnsupportedModelError) as error:
        plphp.prune(family.build())
    results.note(name, "", f"refused: {error.value}")


def test_every_family_of_the_design_must_work() -> None:
    assert set(MUST_WORK) == set(tiny.FAMILIES)
    for name, modes in MUST_WORK.items():
        assert ("video" in modes) == (tiny.FAMILIES[name].draw_video is not None)


def test_a_sample_has_every_pair() -> None:
    for family in tiny.FAMILIES:
        assert {cell[1] for cell in SAMPLE if cell[0] == family} == set(METHODS)
        assert {cell[2] for cell in SAMPLE if cell[0] == family} >= set(MUST_WORK[family])
    assert {cell[1:] for cell in SAMPLE} == {cell[1:] for cell in APPLICABLE}
    assert len(SAMPLE) < len(APPLICABLE) / 4


# --- docs/support.md ------------------------------------------------------------------------------


LINES = [*tiny.FAMILIES, *tiny.DECODERS, *tiny.REFUSED]


def said(results: Results, family: str, mode: str) -> str:
    everything = "" if family in tiny.REFUSED else mode
    return "; ".join(sorted(results.said.get((family, everything), {NOT_APPLICABLE})))


def table(results: Results) -> tuple[list[str], list[str]]:
    """One line a family, none of its cells empty; reasons are footnotes."""
    lines, notes = [["family", *MODES], ["---"] * (len(MODES) + 1)], []
    for family in LINES:
        line = [f"`{family}`"]
        for mode in MODES:
            short, _, reason = said(results, family, mode).partition(": ")
            if reason and reason not in notes:
                notes.append(reason)
            line.append(f"{short} ({notes.index(reason) + 1})" if reason else short)
        lines.append(line)
    numbered = [f"{number}. {note}" for number, note in enumerate(notes, start=1)]
    return [f"| {' | '.join(line)} |" for line in lines], numbered


def page(results: Results) -> str:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    made = (
        f"{results.cells} cells in {results.seconds:.0f} s, none failed: {versions},\n"
        f"{torch.get_num_threads()} CPU threads, {date.today().isoformat()}."
    )
    lines, notes = table(results)
    return TEXT.format(
        table="\n".join(lines), notes="\n".join(notes), made=made, policies=", ".join(METHODS)
    )


TEXT = """# What is supported

`make support` makes this page from a run of `tests/conformance/test_matrix.py`: every family on a
tiny random model of its real transformers class, every policy, every mode, against an independent
oracle. A family's cell says "works" when it does so under all of:
{policies}.

{table}

{notes}

{made}

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
"""


def shown() -> dict[str, dict[str, str]]:
    """The table of the page, reasons in place of their numbers."""
    lines = PAGE.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit() and ". " in line)
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if line.startswith("| `"):
            family, *cells = line.strip("| ").split(" | ")
            whole = [re.sub(r" \((\d+)\)$", lambda m: f": {reasons[m[1]]}", c) for c in cells]
            found[family.strip("`")] = dict(zip(MODES, whole, strict=True))
    return found


def test_the_page_says_what_works(results: Results) -> None:
    """Cells that ran say what the page says; with PLPHP_WRITE_DOCS=1 and all cells, they are it."""
    if os.environ.get("PLPHP_WRITE_DOCS"):
        assert results.cells == len(CELLS), "the page is made from a run of all cells"
        PAGE.write_text(page(results))
    if f"transformers {transformers.__version__}," not in PAGE.read_text():
        pytest.skip("the page speaks of another transformers")
    cells = shown()
    assert list(cells) == LINES
    assert all(all(line.values()) for line in cells.values()), "no empty cell"
    for family, mode in results.said:
        for column in [mode] if mode else MODES:
            now = said(results, family, column)
            assert now in (cells[family][column], NOT_APPLICABLE), f"{family}, {column}"
