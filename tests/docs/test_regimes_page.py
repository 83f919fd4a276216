"""The pages that docs/make_regimes.py makes show what the results in docs/accuracy hold."""

import json
import os
from pathlib import Path

import pytest
from makers import DOCS, maker_of


def test_the_tables_are_made_of_the_results() -> None:
    maker = maker_of("make_regimes")
    for page in maker.PAGES:
        found = json.loads(page.results.read_text())
        text = (DOCS / page.file).read_text()
        assert page.write(text, found) == text, "run: make regimes-page"
        assert text.count(maker.BEGIN) == 1
        assert sum(map(page.shows, found["rows"])) >= 8


def test_shares_are_of_the_full_cache() -> None:
    maker = maker_of("make_regimes")
    rows = [
        {"method": "full", "budget": 1.0, "right": {"a@dense": 0.5, "b@dense": 0.8}},
        {"method": "random", "budget": 0.4, "right": {"a@dense": 0.25, "b@dense": 0.8}},
    ]
    assert maker.of_full(rows, "random", 0.4) == pytest.approx((0.5, 1.0))


@pytest.mark.parametrize(
    ("page", "results", "method", "budget"),
    [
        ("../README.md", "WAYS", "novelty", 0.4),
        ("../README.md", "WAYS", "novelty+host", 0.2),
        ("../README.md", "WAYS", "plphp:paper", None),
        ("regimes.md", "WAYS", "novelty", 0.4),
        ("regimes.md", "WAYS", "novelty", 0.2),
        ("regimes.md", "WAYS", "novelty+host", 0.2),
        ("regimes.md", "WAYS", "plphp:paper", None),
        ("regimes.md", "RESULTS", "divprune/novelty", 0.2),
        ("stages.md", "RESULTS", "divprune/novelty", 0.2),
        ("methods-cache.md", "WAYS", "novelty", 0.2),
    ],
)
def test_shares_in_sentences_are_those_of_the_results(
    page: str, results: str, method: str, budget: float | None
) -> None:
    maker = maker_of("make_regimes")
    found = json.loads(getattr(maker, results).read_text())
    low, high = maker.of_full(found["rows"], method, budget)
    quoted = f"{low:.2f} to {high:.2f}".removeprefix("0")
    assert quoted in (DOCS / page).read_text(), "the sentence has other results"


def in_sentences(page: str) -> str:
    """The text of a page without its tables."""
    lines = (DOCS / page).read_text().splitlines()
    return " ".join(" ".join(line for line in lines if not line.startswith("| ")).split())


# What sentences say of one cell: the share of right answers, by page.
VIDEO = ("stages-video.md", "VIDEO")
SMALL = ("small-devices-results.md", "BITS")
STAGES = ("stages-results.md", "RESULTS")
QUOTED = [
    (*STAGES, "divprune", 0.2, "describe@redundant-4", "it gives {} on `describe`, as all tokens"),
    (*STAGES, "full", 1.0, "describe@redundant-4", "it gives {} on `describe`, as all tokens"),
    (*STAGES, "divprune", 0.2, "grid@redundant-4", "alone gives {} at 20 %"),
    (*STAGES, "divprune/novelty", 0.2, "grid@redundant-4", "`divprune/novelty` {}, and"),
    (*STAGES, "divprune/novelty+int4", 0.2, "grid@redundant-4", "recall `int4` {}."),
    (*STAGES, "divprune", 0.2, "grid@redundant-16", "these give {}, "),
    (*STAGES, "divprune/novelty", 0.2, "grid@redundant-16", "these give 0.82, {} and "),
    (*STAGES, "divprune/novelty+int4", 0.2, "grid@redundant-16", "these give 0.82, 0.89 and {}."),
    (*STAGES, "divprune/novelty", 0.2, "grid@redundant-4", "no worse ({} and"),
    (*STAGES, "divprune", 0.4, "grid@redundant-4", "and {} on `grid`)"),
    (*STAGES, "plphp", 0.4, "describe@redundant-4", "rises from {} to"),
    (*STAGES, "divprune/plphp", 0.4, "describe@redundant-4", "rises from 0.60 to {}."),
    (*STAGES, "downsample", 0.4, "describe@redundant-16", "`downsample` gives {} on"),
    (*STAGES, "downsample", 0.2, "describe@redundant-16", "at 40 %, and {} at 20 %."),
    (*SMALL, "novelty+kv2", 0.07, "describe@redundant-4", "gives {} on `describe` in 2 and"),
    (*SMALL, "novelty+kv4", 0.07, "describe@redundant-4", "gives {} on `describe` in 2 and"),
    (*SMALL, "novelty", 0.07, "describe@redundant-4", "and in full {}; PLPHP"),
    (*SMALL, "plphp+kv2", 0.07, "describe@redundant-4", "PLPHP {} and"),
    (*SMALL, "plphp+kv4", 0.07, "describe@redundant-4", "0.59 and {}, and"),
    (*SMALL, "plphp", 0.07, "describe@redundant-4", "0.56, and {}."),
    (*SMALL, "novelty+kv4", 0.07, "grid@redundant-4", "(`grid` {}) than"),
    (*SMALL, "full+int2", None, "grid@redundant-4", "at 10 % ({}), and"),
    (*VIDEO, "full", 1.0, "describe@video", "beside {} with all tokens"),
    (*VIDEO, "vidcom2", 0.2, "describe@video", "they give {} to 0.77 of"),
    (*VIDEO, "divprune", 0.2, "describe@video", "0.75 to {} of"),
    (*VIDEO, "plphp", 0.4, "describe@video", "({} of `describe` and"),
    (*VIDEO, "plphp", 0.4, "refer@video", "and {} of `refer` at 40 %)"),
    (*VIDEO, "vidcom2/plphp", 0.4, "describe@video", "helps at 40 % ({} and"),
    (*VIDEO, "vidcom2/plphp", 0.4, "refer@video", "and {}), and less"),
    (*VIDEO, "vidcom2/plphp", 0.2, "describe@video", "less at 20 % ({} and"),
    (*VIDEO, "vidcom2/plphp", 0.2, "refer@video", "and {}). - **`visionzip`"),
    (*VIDEO, "visionzip", 0.2, "describe@video", "lose**: {} of"),
    (*VIDEO, "dart", 0.4, "describe@video", "and {} at 40 %. - **Frames"),
    (*VIDEO, "random", 0.4, "describe@video", "tokens do well** ({} at 40 %)"),
    (*VIDEO, "downsample", 0.4, "describe@video", "`downsample` gives {} at 40 %"),
]


@pytest.mark.parametrize(("page", "results", "method", "budget", "task", "says"), QUOTED)
def test_cells_in_sentences_are_those_of_the_results(
    page: str, results: str, method: str, budget: float | None, task: str, says: str
) -> None:
    maker = maker_of("make_regimes")
    rows = json.loads(getattr(maker, results).read_text())["rows"]
    (found,) = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
    assert says.format(f"{found['right'][task]:.2f}") in in_sentences(page)


@pytest.mark.parametrize(
    ("method", "budget", "says"),
    [
        ("divprune/novelty", 0.2, "first token takes {} of the full"),
        ("divprune", 0.4, "`divprune` at 40 % {}, because"),
        ("downsample", 0.2, "work ({} at 20 %)"),
    ],
)
def test_times_in_sentences_are_those_of_the_results(method: str, budget: float, says: str) -> None:
    maker = maker_of("make_regimes")
    text = in_sentences("stages-results.md")
    assert says.format(f"{maker.times()[method, budget]:.2f}") in text
    share = json.loads(maker.FIRST_TOKEN.read_text())["rows"][0]["tower_share"]
    assert f"The tower takes {share:.0%}".replace("%", " %") in text


@pytest.mark.parametrize("weights", ["none", "int8", "int4"])
@pytest.mark.parametrize(
    ("name", "method", "budget"),
    [("all", "full", 1.0), ("recommended, 40 %", "novelty", 0.4), ("the same", "novelty+kv4", 0.4)],
)
def test_the_table_of_rounded_weights_is_that_of_its_runs(
    weights: str, name: str, method: str, budget: float
) -> None:
    maker = maker_of("make_regimes")
    rows = json.loads((DOCS / "accuracy" / "weights.json").read_text())[weights]["rows"]
    (found,) = [row for row in rows if (row["method"], row["budget"]) == (method, budget)]
    told = "in full" if weights == "none" else f"`{weights}`"
    text = (DOCS / "small-devices.md").read_text().splitlines()
    lines = [line for line in text if line.startswith(f"| {name}") and f"| {told} |" in line]
    right = [f"{found['right'][f'{task}@redundant-4']:.2f}" for task in maker.TASKS]
    assert all(line.endswith(f"| {' | '.join(right)} |") for line in lines)
    assert len(lines) == (name != "the same" or weights == "int4")


def row(method: str, budget: float | None, **right: float) -> dict[str, object]:
    names = {f"{task}@dense": value for task, value in right.items()}
    kept = dict.fromkeys(names, budget or 0.65)
    return {"method": method, "budget": budget, "right": names, "kept": kept, "bytes": kept}


def test_a_table_has_its_own_methods_and_budgets_and_the_controls() -> None:
    maker = maker_of("make_regimes")
    page = maker.Page("page.md", ("plphp", "plphp:paper"), (0.4,), {})
    shown = [
        (method, budget)
        for method in ("full", "random", "plphp", "plphp:paper", "novelty")
        for budget in (None, 0.4, 0.2)
        if page.shows(row(method, budget))
    ]
    assert ("full", 0.2) in shown and ("plphp:paper", None) in shown
    assert ("plphp", 0.4) in shown and ("random", 0.4) in shown
    assert ("plphp", 0.2) not in shown and not any(method == "novelty" for method, _ in shown)


def test_an_overview_has_the_first_budget_and_tables_are_folded() -> None:
    maker = maker_of("make_regimes")
    rows = [row("full", 1.0, a=1.0), row("plphp", 0.4, a=0.5), row("plphp", 0.2, a=0.25)]
    about = dict.fromkeys(
        ("date", "machine", "dtype", "torch", "transformers", "limit", "seed"), "x"
    )
    columns = {"a": ("a@dense",)}
    page = maker.Page("page.md", ("plphp",), (0.4, 0.2), {"each": columns}, columns)
    text = page.write(f"{maker.BEGIN}{maker.END}", {"rows": rows, "about": about})
    overview, details = text.split("<details")
    assert "| 0.50 |" in overview and "| 0.25 |" not in overview
    assert "<summary>each</summary>\n\n| method |" in details
    assert "| 0.50 |" in details and "| 0.25 |" in details
    assert "<details" not in maker.folded("", "table")


def test_a_column_is_the_mean_of_its_tasks_and_incomplete_rows_are_left_out() -> None:
    maker = maker_of("make_regimes")
    rows = [row("plphp", 0.4, a=0.5, b=1.0), row("novelty", 0.4, a=1.0, b=1.0)]
    rows += [row("random", 0.4, a=0.5)]
    table = maker.table(rows, {"both": ("a@dense", "b@dense")}).splitlines()
    assert table[2:] == [
        "| novelty (recommended) | 40% | 0.40 | 1.00 |",
        "| PLPHP | 40% | 0.40 | 0.75 |",
    ]


def results(date: str, **cells: float) -> dict[str, object]:
    about = {"model": "m", "dtype": "float32", "limit": 48, "seed": 7, "date": date}
    about |= {"machine": "box", "torch": "2", "transformers": "5"}
    return {"about": about, "rows": [row("plphp", 0.4, **cells)]}


def test_another_run_adds_cells_and_changes_none() -> None:
    maker = maker_of("make_regimes")
    before, new = results("day 1", a=0.5), results("day 2", a=0.9, b=0.25)
    new["rows"] = [*new["rows"], row("dart", 0.4, b=0.75)]  # type: ignore[misc]
    both = maker.add(before, new)
    assert [one["right"] for one in both["rows"]] == [
        {"a@dense": 0.5, "b@dense": 0.25},
        {"b@dense": 0.75},
    ]
    page = maker.Page("page.md", ("plphp", "dart"), (0.4,), {"": {"b": ("b@dense",)}})
    text = page.write(f"{maker.BEGIN}{maker.END}", both)
    assert text.count("Measured on") == 1 and "Measured on day 2" in text
    wide = {"": {"a": ("a@dense",), "b": ("b@dense",)}}
    text = maker.Page("page.md", ("plphp",), (0.4,), wide).write(text, both)
    assert text.index("Measured on day 1") < text.index("Measured on day 2")
    assert maker.add(both, new)["rows"] == both["rows"]
    other = results("day 3", c=0.1)
    other["about"]["seed"] = 8  # type: ignore[index]
    with pytest.raises(ValueError, match="another seed"):
        maker.add(before, other)


def test_a_table_may_have_the_time_to_the_first_token() -> None:
    maker = maker_of("make_regimes")
    rows = [row("plphp", 0.4, a=0.5), row("novelty+int4", 0.4, a=0.25), row("dart", 0.4, a=0.1)]
    first = {("plphp", 0.4): 1.02, ("novelty", 0.4): 1.01}
    lines = maker.table(rows, {"a": ("a@dense",)}, first).splitlines()
    assert lines[0] == "| method | kept | cache bytes | first token | a |"
    assert lines[1] == "|---|---|---|---|---|"
    assert lines[2] == "| PLPHP | 40% | 0.40 | 1.02 | 0.50 |"
    assert lines[3] == "| novelty, recall `int4` | 40% | 0.40 | 1.01 | 0.25 |"
    assert lines[4] == "| dart | 40% | 0.40 |  | 0.10 |"


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
