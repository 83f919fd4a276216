"""Every family x every policy x every mode: one cell each, and docs/support.md from their results.

PLPHP and each of its options meet every family in every mode. Other policies run in the cells that
a pairwise sample needs. Ways to run a model (`circumstances.py`) meet a few families. The normal
run has the sample, and every way on one family; all other cells are marked slow. With recall all
this is done again, on fewer families. After a run of all cells PLPHP_WRITE_DOCS=1 rewrites the
page, or the half of it whose cells were all run. Every other run is compared with the page.
"""

import os
import time

import circumstances
import pytest
import transformers
from circumstances import CIRCUMSTANCES, COLUMNS, COMPILES, MAY_REFUSE, PLAIN, RECALLED
from methods import METHODS, OPTIONS, goes_with_recall, home_of, method
from modes import MODES, NotApplicable
from page import NOT_APPLICABLE, PAGE, WORKS, Results, every_key, page, shown
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
# The kinds of layers of a decoder do not depend on how images are cut, or on the policy.
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
WITH_RECALL = circumstances.recalled()
NORMAL = {
    *SAMPLE,
    *circumstances.normal(),
    *circumstances.normal_recalled(),
    *(cell for cell in DECODERS if cell[2] == "padded batch"),
}
# `make quick` takes one cell of every family: the one in which most can go wrong.
QUICK = {cell for cell in (*WHOLE, *DECODERS) if cell[1:] == ("plphp", "padded batch")}


def marks(cell: tuple[str, str, str]) -> list[pytest.MarkDecorator]:
    found = [pytest.mark.cell]
    found += [pytest.mark.quick] if cell in QUICK else []
    return found + ([] if cell in NORMAL else [pytest.mark.slow])


CELLS = [
    pytest.param(*cell, marks=marks(cell), id="-".join(cell).replace(" ", "_"))
    for cell in (*WHOLE, *DECODERS, *WAYS, *WITH_RECALL)
]


@pytest.mark.parametrize(("family", "name", "mode"), CELLS)
def test_cell(family: str, name: str, mode: str, results: Results) -> None:
    home = home_of(name)
    if not EVERY[family].available:
        results.note(family, mode, NOT_APPLICABLE, home)
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    begin = time.perf_counter()
    try:
        run(family, name, mode)
        result = WORKS if told(family, mode) else "works, given a `vision_mask`"
    except NotApplicable as reason:
        result = f"{NOT_APPLICABLE}: {reason}"
    except (plphp.UnsupportedModelError, plphp.UnsupportedModeError) as error:
        if must_work(family, mode, home):
            raise
        result = f"refused: {error}"
    results.note(family, mode, result, home, time.perf_counter() - begin)


def run(family: str, name: str, mode: str) -> None:
    if mode in CIRCUMSTANCES:
        circumstances.run(CIRCUMSTANCES[mode], family, method(name))
    else:
        MODES[mode].check(MODES[mode], family, method(name))


def must_work(family: str, mode: str, home: str) -> bool:
    if home and mode in circumstances.NOT_WITH_RECALL:
        return False
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


def test_the_quick_run_has_every_family() -> None:
    assert sorted(cell[0] for cell in QUICK) == sorted([*tiny.FAMILIES, *tiny.DECODERS])


def test_every_circumstance_has_a_cell_for_every_family_of_its_table() -> None:
    assert not {*MODES} & {*CIRCUMSTANCES}
    met = {(family, mode) for family, _, mode in WAYS}
    assert met == {(family, mode) for family in COLUMNS for mode in CIRCUMSTANCES}
    assert {cell[2] for cell in circumstances.normal()} == {*CIRCUMSTANCES} - {*COMPILES}
    assert {cell[0] for cell in circumstances.normal()} == {*COLUMNS}


def test_recall_meets_every_mode_and_every_family() -> None:
    by_plphp = {(family, mode) for family, name, mode in WITH_RECALL if name.startswith("plphp+")}
    applicable = {mode.name for mode in MODES.values() if mode.applies(tiny.FAMILIES[RECALLED[0]])}
    assert {mode for _, mode in by_plphp} == applicable | {*CIRCUMSTANCES}
    assert {family for family, mode in by_plphp if mode == PLAIN} == {*circumstances.FAMILIES}
    ranks = {name for name in METHODS if goes_with_recall(name)}
    assert {name.partition("+")[0] for _, name, _ in WITH_RECALL} == ranks
    normal = circumstances.normal_recalled()
    assert {cell[2] for cell in normal} == {cell[2] for cell in WITH_RECALL} - {*COMPILES}
    assert {cell[0] for cell in normal} == {*circumstances.FAMILIES}


def test_the_page_says_what_works(results: Results) -> None:
    """Results equal the page; with PLPHP_WRITE_DOCS=1 and all cells, the page is written."""
    if os.environ.get("PLPHP_WRITE_DOCS"):
        cells = {False: len(CELLS) - len(WITH_RECALL), True: len(WITH_RECALL)}
        whole = {recall for recall, many in cells.items() if results.cells[recall] == many}
        assert whole, "the page is made from a run of all cells, or of all with or without recall"
        PAGE.write_text(page(results, whole))
    if f"transformers {transformers.__version__}," not in PAGE.read_text():
        pytest.skip("the page speaks of another transformers")
    cells = shown()
    halves = {bool(home) for _, _, home in cells}
    assert set(cells) == {key for key in every_key() if bool(key[2]) in halves}
    assert all(cells.values()), "no empty cell"
    for family, mode, home in [key for key in results.said if bool(key[2]) in halves]:
        for column in [mode] if mode else MODES:
            now = {*results.cell(family, column, home)} - {NOT_APPLICABLE}
            assert now <= {*cells[family, column, home]}, f"{family}, {column}, {home}"
    if len(halves) < 2:
        pytest.skip("the page has no half with recall yet: make support-recall")
