"""docs/regimes.md shows what docs/accuracy/regimes.json holds."""

import json

import pytest
from makers import DOCS, maker_of


def test_the_tables_are_made_of_the_results() -> None:
    maker = maker_of("make_regimes")
    found = json.loads(maker.RESULTS.read_text())
    text = (DOCS / "regimes.md").read_text()
    assert maker.page(text, found) == text, "run: make regimes-page"
    assert len(found["rows"]) > 20


def test_shares_are_of_the_full_cache() -> None:
    maker = maker_of("make_regimes")
    rows = [
        {"method": "full", "budget": 1.0, "right": {"a@dense": 0.5, "b@dense": 0.8}},
        {"method": "random", "budget": 0.4, "right": {"a@dense": 0.25, "b@dense": 0.8}},
    ]
    assert maker.of_full(rows, "random", 0.4) == pytest.approx((0.5, 1.0))
