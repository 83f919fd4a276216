"""docs/accuracy.md is what its template makes of the committed JSON, and says who loses."""

import json
from typing import Any

import pytest
from makers import DOCS, maker_of


@pytest.fixture(scope="module")
def maker() -> Any:
    return maker_of("make_accuracy")


def test_the_page_is_made_of_the_summary(maker: Any) -> None:
    assert (DOCS / "accuracy.md").read_text() == maker.page(), "run: make accuracy-page"


def test_the_page_has_every_method_task_and_budget(maker: Any) -> None:
    page = (DOCS / "accuracy.md").read_text()
    summary = json.loads((DOCS / "accuracy" / "summary.json").read_text())
    for name, task in summary["tasks"].items():
        assert f"### {name}\n" in page
        for row in task["settings"]:
            assert f"| {row['method']} |" in page
    assert "| kept | 100% | 60% | 40% | 20% | 10% |" in page
    for name in ("command", "date", "machine", "seed", "torch", "transformers"):
        assert summary["made"][name] in page


@pytest.mark.parametrize(
    ("verdict", "counts"),
    [("wins", "1 / 0 / 0"), ("no difference shown", "0 / 1 / 0"), ("loses", "0 / 0 / 1")],
)
def test_verdicts_are_counted_and_named(maker: Any, verdict: str, counts: str) -> None:
    paired = {"random": {"mean": -0.1, "low": -0.2, "high": -0.05, "verdict": verdict}}
    tasks = {"made": {"settings": [{"method": "plphp", "budget": 0.2, "paired": paired}]}}
    assert f"| random |  |  | {counts} |  |" in maker._short(tasks)
    assert f"| plphp | {counts} |" in maker._tally(tasks)
    assert list(maker._verdicts(tasks["made"])) == [
        f"PLPHP against `random`: {verdict} at 20% (-0.10)."
    ]
