"""docs/recall.md shows what docs/recall/results.json holds."""

import json
from pathlib import Path

from makers import DOCS, maker_of


def test_the_table_is_made_of_the_results() -> None:
    rows = json.loads((DOCS / "recall" / "results.json").read_text())["rows"]
    table = maker_of("make_recall").table(rows)
    assert len(rows) > 40
    assert table in (DOCS / "recall.md").read_text(), "run: python docs/make_recall.py"


def test_results_are_shares_of_the_same_samples(tmp_path: Path) -> None:
    lines = [
        {"task": "grid", "method": method, "budget": budget, "id": str(i), "kept": kept, "exact": e}
        for method, budget, kept in (("full", 1.0, 1.0), ("plphp", 0.4, 0.5))
        for i in range(200)
        for e in [float(i % 2 == 0 if method == "plphp" else i < 200)]
        if not (method == "full" and i >= 150)
    ]
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "grid.jsonl").write_text("\n".join(map(json.dumps, lines)))
    maker = maker_of("make_recall")
    full, own = maker.results(maker.read([tmp_path]))
    assert (full["samples"], own["samples"]) == (150, 150)
    assert own["of_full"] == own["exact"] == 0.5 and own["bytes"] == 0.5
    assert own["interval"][0] < 0.5 < own["interval"][1]
