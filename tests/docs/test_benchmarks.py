"""docs/benchmarks.md is what its template makes of the committed results, and invents none."""

import json
from typing import Any

import pytest
from makers import DOCS, maker_of


@pytest.fixture(scope="module")
def maker() -> Any:
    return maker_of("make_benchmarks")


def test_the_page_is_made_of_the_results(maker: Any) -> None:
    assert (DOCS / "benchmarks.md").read_text() == maker.page(), "run: make bench-page"


def test_every_result_belongs_to_a_run_and_says_where_it_was_made(maker: Any) -> None:
    page = (DOCS / "benchmarks.md").read_text()
    for folder, runs in (("cpu", maker.CPU), ("gpu", maker.GPU)):
        for path in (DOCS / "benchmarks" / folder).glob("*.json"):
            assert path.stem in runs
            found = json.loads(path.read_text())
            assert (found["setting"]["device"] == "cuda") == (folder == "gpu")
            for name in ("machine", "torch", "transformers", "date"):
                assert found["about"][name] in page
    assert len(maker.CPU) == len({*maker.CPU}) > 5


def test_ratios_compare_neighbours_and_gaps_are_said(maker: Any) -> None:
    steps = [{"name": "a", "rounds_ms": [2.0, 9.0, 4.0]}, {"name": "b", "rounds_ms": [1, 3, 4]}]
    assert maker.over({"steps": steps}, "a", "b") == "2.00 (1.00 - 3.00)"
    assert maker.over({"steps": steps}, "a", "c") == ""
    assert maker.over(None, "a", "b") == "not measured yet"
