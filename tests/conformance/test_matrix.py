"""Every family x every policy x every mode: one cell each, and docs/support.md from their results.

The normal run takes the cells that a pairwise sample needs; the others are marked slow. After a run
of all cells, `PLPHP_WRITE_DOCS=1` rewrites the page; every other run is held against it.
"""

import os
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers
from methods import METHODS
from modes import MODES
from sampling import pairwise

import plphp
import tiny

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
WORKS, NOT_APPLICABLE = "works", "not applicable"

# What must work: a refusal in one of these cells is a failure. Others may refuse with a reason.
IMAGES = ("one image", "several images", "padded batch")
MUST_WORK: dict[str, tuple[str, ...]] = {
    "qwen2_vl": (*IMAGES, "video"),
    "qwen2_5_vl": (*IMAGES, "video"),
    "qwen3_vl": (*IMAGES, "video"),
    "qwen3_vl_moe": (*IMAGES, "video"),
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


CELLS = [
    pytest.param(
        *cell,
        marks=() if cell in SAMPLE else pytest.mark.slow,
        id="-".join(cell).replace(" ", "_"),
    )
    for cell in APPLICABLE
]


@pytest.mark.parametrize(("family", "method", "mode"), CELLS)
def test_cell(family: str, method: str, mode: str, results: Results) -> None:
    if not tiny.FAMILIES[family].available:
        results.note(family, mode, NOT_APPLICABLE)
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    begin = time.perf_counter()
    try:
        MODES[mode].check(MODES[mode], family, METHODS[method])
        result = WORKS if told(family, mode) else "works, given a `vision_mask`"
    except (plphp.UnsupportedModelError, plphp.UnsupportedModeError) as error:
        if mode in MUST_WORK[family]:
            raise
        result = f"refused: {error}"
    results.note(family, mode, result)
    results.cells += 1
    results.seconds += time.perf_counter() - begin


def told(family: str, mode: str) -> bool:
    return mode != "video" or tiny.FAMILIES[family].videos_told


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


def table(results: Results) -> list[str]:
    """One line a family, none of its cells empty."""
    head = ["family", *MODES]
    lines = [head, ["---"] * len(head)]
    for family in tiny.FAMILIES:
        lines.append([f"`{family}`", *(cell(results, family, mode) for mode in MODES)])
    for name in tiny.REFUSED:
        lines.append([f"`{name}`", *[cell(results, name, "")] * len(MODES)])
    return [f"| {' | '.join(line)} |" for line in lines]


def cell(results: Results, family: str, mode: str) -> str:
    said = results.said.get((family, mode), {NOT_APPLICABLE})
    return "; ".join(sorted(said)).replace("|", "\\|")


def page(results: Results) -> str:
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    made = (
        f"{results.cells} cells in {results.seconds:.0f} s, none failed: {versions}, "
        f"{torch.get_num_threads()} CPU threads, {date.today().isoformat()}."
    )
    return TEXT.format(table="\n".join(table(results)), made=made, policies=", ".join(METHODS))


TEXT = """# What is supported

`make support` makes this page from a run of `tests/conformance/test_matrix.py`: every family on a
tiny random model of its real transformers class, every policy, every mode, against an independent
oracle. A family's cell says "works" when it does so under all of: {policies}.

{table}

{made}

- Checked in every cell with images: images are counted as a person counts them, selection and
  decoding equal the oracle's, keeping all equals the untouched model, a row of a padded batch
  equals the row alone, and the model is afterwards as it was.
- `internvl` and `smolvlm` write the frames of a video as they write images, and nothing in the
  prompt's tensors tells them apart: each frame counts as an image, and the report says so.
  `plphp.prune(model, vision_mask=...)` makes them one video.
- `gemma3` and `cohere2_vision` have sliding-window layers. Where a prompt is longer than their
  window they are left alone and the report names them; the full-attention layers are pruned.
- Classes that are not listed are found by their config's image token id, every unbroken run of
  those tokens an image, or refused.
"""


def test_the_page_says_what_works(results: Results) -> None:
    """Cells that ran say what the page says; with PLPHP_WRITE_DOCS=1 and all cells, they are it."""
    if os.environ.get("PLPHP_WRITE_DOCS"):
        assert results.cells == len(APPLICABLE), "the page is made from a run of all cells"
        PAGE.write_text(page(results))
    lines = PAGE.read_text().splitlines()
    head = ["family", *MODES]
    shown = {
        cells[0].strip("`"): dict(zip(head, cells, strict=True))
        for line in lines
        if line.startswith("| `") and (cells := line.strip("| ").split(" | "))
    }
    assert set(shown) == {*tiny.FAMILIES, *tiny.REFUSED}
    assert all(all(row.values()) for row in shown.values()), "no empty cell"
    for (family, mode), said in results.said.items():
        for column in [mode] if mode else MODES:
            assert shown[family][column] in {*said, NOT_APPLICABLE} or said == {NOT_APPLICABLE}
