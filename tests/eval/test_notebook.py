"""The notebook runs from the first cell to the last, offline, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plphp
from plphp.demo.model import load

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "prune.ipynb"


def test_every_cell_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    space: dict[str, Any] = {}
    shown = None
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "the notebook is stored without outputs"
            code = "".join(cell["source"])
            if code.startswith("plphp.inspect("):
                code = f"shown = {code}"
            exec(compile(code, f"cell {number}", "exec"), space)
            shown = space.get("shown", shown)
    introduction = "".join(cells[0]["source"])
    assert "ipywidgets" in introduction and 'or "cpu"' in "".join(cells[2]["source"])
    printed = capsys.readouterr().out
    assert "gamma" in printed and "recommended  40%" in printed
    html = shown._repr_html_()
    assert html.startswith("<iframe srcdoc=") and "what is brown" in html
    assert html.count('"') < 10, "the page is escaped inside the attribute"


def test_one_call_takes_names_files_and_policies(tmp_path: Path) -> None:
    picture = str(Path(plphp.demo.__file__).parent / "pictures" / "a1.png")
    inspection = plphp.inspect(
        "embedded", picture, "what is brown in picture 1?", ["plphp", "random"], oracle=False
    )
    assert repr(inspection).startswith("<Inspection of plphp, random: ")
    assert len(repr(inspection)) < 120
    assert len(repr(inspection.page)) < 9000, "pictures and masks are data, not text"
    assert [run.policy for run in inspection.page.runs] == ["plphp", "random"]
    assert str(inspection).count("of the vision K/V kept") == 2
    inspection.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_a_model_needs_its_processor() -> None:
    with pytest.raises(plphp.InputTypeError, match="needs the processor of this model"):
        plphp.inspect(load().model, [], "what is it?")
