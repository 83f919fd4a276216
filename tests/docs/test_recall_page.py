"""The pages about recall show what docs/recall/results.json holds."""

import json
from pathlib import Path

from makers import DOCS, maker_of


def test_the_tables_are_made_of_the_results() -> None:
    rows = json.loads((DOCS / "recall" / "results.json").read_text())["rows"]
    maker = maker_of("make_recall")
    assert len(rows) > 40
    for name, made in maker.tables(rows).items():
        text = (DOCS / name).read_text()
        assert maker.written(text, made) == text, "run: python docs/make_recall.py"
        assert text.count(maker.BEGIN) == 1


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
