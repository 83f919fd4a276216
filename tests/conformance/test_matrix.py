"""Every family x every policy x every mode: one cell each, and docs/support.md from their results.

PLPHP and each of its options meet every family in every mode; other policies the cells that a
pairwise sample needs. Ways to run a model (`circumstances.py`) meet a few families. The normal run
takes the sample and every way on one family; the others are marked slow. After a run of all cells,
`PLPHP_WRITE_DOCS=1` rewrites the page; every other run is held against it.
"""

import os
import time

import circumstances
import pytest
import transformers
from circumstances import CIRCUMSTANCES, COLUMNS, COMPILES, MAY_REFUSE
from methods import METHODS, OPTIONS
from modes import MODES, NotApplicable
from page import LINES, NOT_APPLICABLE, PAGE, WORKS, Results, page, shown
from sampling import pairwise

import plphp
import tiny
from invariants import EVERY

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


@pytest.fixture(scope="module")
def results() -> Results:
    return Results()


WHOLE = [cell for cell in APPLICABLE if cell[1] in OPTIONS or cell in SAMPLE]
WAYS = circumstances.cells()
NORMAL = {
    *SAMPLE,
    *circumstances.normal(),
    *(cell for cell in DECODERS if cell[2] == "padded batch"),
}
CELLS = [
    pytest.param(
        *cell,
        marks=() if cell in NORMAL else pytest.mark.slow,
        id="-".join(cell).replace(" ", "_"),
    )
    for cell in (*WHOLE, *DECODERS, *WAYS)
]


@pytest.mark.parametrize(("family", "method", "mode"), CELLS)
def test_cell(family: str, method: str, mode: str, results: Results) -> None:
    if not EVERY[family].available:
        results.note(family, mode, NOT_APPLICABLE)
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    begin = time.perf_counter()
    try:
        run(family, method, mode)
        result = WORKS if told(family, mode) else "works, given a `vision_mask`"
    except NotApplicable as reason:
        result = f"{NOT_APPLICABLE}: {reason}"
    except (plphp.UnsupportedModelError, plphp.UnsupportedModeError) as error:
        if must_work(family, mode):
            raise
        result = f"refused: {error}"
    results.note(family, mode, result)
    results.cells += 1
    results.seconds += time.perf_counter() - begin


def run(family: str, method: str, mode: str) -> None:
    if mode in CIRCUMSTANCES:
        circumstances.run(CIRCUMSTANCES[mode], family, METHODS[method])
    else:
        MODES[mode].check(MODES[mode], family, METHODS[method])


def must_work(family: str, mode: str) -> bool:
    if mode in CIRCUMSTANCES:
        return family not in MAY_REFUSE.get(mode, ())
    return mode in MUST_WORK.get(family, ())


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


def test_every_way_meets_every_column() -> None:
    assert not {*MODES} & {*CIRCUMSTANCES}
    met = {(family, mode) for family, _, mode in WAYS}
    assert met == {(family, mode) for family in COLUMNS for mode in CIRCUMSTANCES}
    assert {cell[2] for cell in circumstances.normal()} == {*CIRCUMSTANCES} - {*COMPILES}
    assert {cell[0] for cell in circumstances.normal()} == {*COLUMNS}


def test_the_page_says_what_works(results: Results) -> None:
    """Cells that ran say what the page says; with PLPHP_WRITE_DOCS=1 and all cells, they are it."""
    if os.environ.get("PLPHP_WRITE_DOCS"):
        assert results.cells == len(CELLS), "the page is made from a run of all cells"
        PAGE.write_text(page(results))
    if f"transformers {transformers.__version__}," not in PAGE.read_text():
        pytest.skip("the page speaks of another transformers")
    cells = shown()
    wanted = {(family, mode) for family in LINES for mode in MODES}
    assert set(cells) == wanted | {(family, mode) for family in COLUMNS for mode in CIRCUMSTANCES}
    assert all(cells.values()), "no empty cell"
    for family, mode in results.said:
        for column in [mode] if mode else MODES:
            now = {*results.cell(family, column)} - {NOT_APPLICABLE}
            assert now <= {*cells[family, column]}, f"{family}, {column}"
