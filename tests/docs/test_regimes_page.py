"""docs/regimes.md shows what docs/accuracy/regimes.json holds."""

import json
import os
from pathlib import Path

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


def test_the_page_says_what_a_run_was_measured_on(tmp_path: Path) -> None:
    about = {"dtype": "bfloat16", "torch": "2.13.0", "transformers": "5.24.0"}
    about |= {"limit": 7, "seed": 11}
    row = {"method": "full", "budget": 1.0, "score": {"mean": 0.5}, "kept": 1.0}
    row |= {"kv_bytes": 8, "kv_bytes_full": 8}
    tasks = {f"what@{suite}": {"settings": [row]} for suite in ("dense", "redundant-4")}
    (tmp_path / "summary.json").write_text(json.dumps({"about": about, "tasks": tasks}))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "full.jsonl").touch()
    os.utime(tmp_path / "samples" / "full.jsonl", (0, 0))
    maker = maker_of("make_regimes")
    taken = maker.take_in(tmp_path)
    sentence = maker.measured(taken["about"])
    assert sentence.startswith(f"Measured on 1970-01-01 on {taken['about']['machine']} (bfloat16, ")
    assert sentence.endswith("with 7 samples of each task and seed 11.\n")
