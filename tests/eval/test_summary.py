"""What a summary says of lines whose numbers are known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plphp.eval import curves
from plphp.eval.curves import draw
from plphp.eval.present import write
from plphp.eval.summary import summarize
from plphp.eval.tables import FEW, markdown

SAMPLES = 40
RIGHT = {"full": 36, "random": 18, "uniform": 30, "plphp": 30, "downsample": 5}


def line(method: str, number: int, right: bool) -> dict[str, Any]:
    budget = 1.0 if method == "full" else 0.4
    scores = {"exact": float(right), "vqa": float(right), "words": float(right)}
    found = {
        "task": "made", "id": f"made-{number}", "method": method, "budget": budget,
        "answer": "the K is red" if right else "the K is blue", **scores,
        "same": right, "kept": 1.0 if method == "full" else 0.41,
        "kv_bytes": 100 if method == "full" else 50, "kv_bytes_full": 100,
    }  # fmt: skip
    if method == "full":
        return {**found, "vision": 16, "tokens": 3, "one_token": number >= SAMPLES - 4}
    # The first token is the prompt's; the second is off, the third is not.
    return {**found, "kl": [0.0, 0.5, 0.1], "agree": [1, int(right), 1]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for folder in ("samples", "tasks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run.json").write_text('{"model": "made"}')
    (tmp_path / "policies.json").write_text("{}")
    samples = [
        {"id": f"made-{k}", "pictures": 1 + k % 2, "question": "?", "answers": ["the K is red"]}
        for k in range(SAMPLES)
    ]
    task = {"task": "made", "what": "made up", "metric": "exact"}
    (tmp_path / "tasks" / "made.json").write_text(json.dumps({**task, "samples": samples}))
    rows = [line(m, k, k < count) for m, count in RIGHT.items() for k in range(SAMPLES)]
    rows.append({"task": "made", "method": "vtw", "budget": 0.4, "skipped": "cannot"})
    (tmp_path / "samples" / "made.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    return tmp_path


def test_means_intervals_and_verdicts(out: Path) -> None:
    task = summarize(out)["tasks"]["made"]
    by = {row["method"]: row for row in task["settings"]}
    counted = SAMPLES - 4
    assert (task["samples"], task["one_token"]) == (counted, 4)
    assert by["plphp"]["score"]["mean"] == pytest.approx(30 / counted, abs=1e-5)
    assert by["plphp"]["relative"]["mean"] == pytest.approx(30 / 36, abs=1e-5)
    assert by["full"]["relative"] == {"mean": 1, "low": 1, "high": 1}
    # Standard error of a share of 36: an interval is about four of them wide.
    share = 30 / counted
    wide = by["plphp"]["score"]["high"] - by["plphp"]["score"]["low"]
    assert wide == pytest.approx(3.92 * np.sqrt(share * (1 - share) / counted), rel=0.15)
    paired = by["plphp"]["paired"]
    assert paired["random"]["verdict"] == "wins"
    assert paired["uniform"] == {
        "mean": 0, "low": 0, "high": 0, "budget": 0.4, "verdict": "no difference shown",
    }  # fmt: skip
    assert by["random"]["paired"]["uniform"]["verdict"] == "loses"
    assert by["downsample"]["paired"]["random"]["verdict"] == "loses"
    assert by["vtw"]["skipped"] == "cannot"


def test_values_without_intervals_are_means(out: Path) -> None:
    by = {row["method"]: row for row in summarize(out)["tasks"]["made"]["settings"]}
    plphp = by["plphp"]
    assert plphp["kl"] == pytest.approx(0.3)  # of the second and third token
    assert plphp["kl_by_position"] == [0, 0.5, 0.1]
    assert plphp["agreement"] == pytest.approx((30 + 6 * 0.5) / 36, abs=1e-5)
    assert (plphp["kept"], plphp["kv_bytes"], plphp["kv_bytes_full"]) == (0.41, 50, 100)
    assert plphp["by_pictures"]["1"]["n"] == plphp["by_pictures"]["2"]["n"] == 18
    assert plphp["one_token"] == {"n": 4, "mean": 0}
    assert by["full"]["agreement"] == 1 and by["full"]["kl"] == 0


def test_the_same_lines_make_the_same_files(out: Path) -> None:
    written = []
    for _ in range(2):
        write(summarize(out), out)
        written.append({p.name: p.read_bytes() for p in out.iterdir() if p.is_file()})
    assert written[0] == written[1]
    assert {"summary.json", "summary.md", "curves.png", "kl.png", "curves-made.png"} <= set(
        written[0]
    )
    assert "no difference shown (+0.000)" in written[0]["summary.md"].decode()
    assert json.loads(written[0]["summary.json"])["tasks"]["made"]["samples"] == 36


def test_recall_is_on_the_chart_at_its_device_bytes(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parked = {("plphp+host", 0.4): 0.39, ("plphp+host", 0.2): 0.19, ("full+int4", None): 0.32}
    rows = [
        {**line(method, k, k < 35), "budget": budget, "kept": kept}
        for (method, budget), kept in parked.items()
        for k in range(SAMPLES)
    ]
    with (out / "samples" / "made.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(curves, "_save", lambda _, panels, path: drawn.update({path.name: panels}))
    write(summarize(out), out)
    (panel,) = drawn["curves.png"]
    shown = {found.get_label(): sorted(found.get_xdata()) for found in panel.get_lines()}
    assert shown["plphp"] == [0.41]
    assert shown["plphp+host"] == [0.19, 0.39, 1.0] and shown["full+int4"] == [0.32]
    assert panel.get_xlabel() == "vision K/V on the device"
    table = (out / "summary.md").read_text()
    assert "| plphp+host | 20% | 19.0% |" in table and "| full+int4 | own | 32.0% |" in table
    assert "device bytes" in table


def test_nothing_to_draw_is_no_error(tmp_path: Path) -> None:
    assert draw({"tasks": {}}, tmp_path) == []


@pytest.mark.parametrize(("samples", "warned"), [(2, True), (FEW - 1, True), (FEW, False)])
def test_few_samples_come_with_a_warning(samples: int, warned: bool) -> None:
    task = {"what": "photos", "samples": samples, "vision_tokens": 36, "answer_tokens": 8,
            "metric": "agreement", "one_token": 0, "settings": []}  # fmt: skip
    said = markdown({"about": {"attn": None, "dtype": "float32"}, "tasks": {"folder": task}})
    assert "\n\ndtype float32\n\n" in said, "what was not given is not told"
    assert ("mean little" in said) == warned
