"""Write docs/recall/results.json, its picture, and the tables in docs/recall*.md.

    python docs/make_recall.py [--run DIR ...]

Each DIR is the --out directory of a `plphp eval`; the samples of all of them are combined. Without
--run, the figure and the tables are made from the committed results.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "recall"
BEGIN, END = "<!-- by docs/make_recall.py -->", "<!-- until here -->"
TASKS = ("describe", "grid", "long", "refer", "second")
RESAMPLES, LEAST = 2000, 100  # a task with fewer samples is left out
NAMES = {
    ("plphp+host", 0.4): "recall, host",
    ("plphp+host", 0.2): "recall, host",
    ("random+host", 0.4): "recall, host, random at first",
    ("random+host", 0.2): "recall, host, random at first",
    ("novelty+int4", 0.4): "recall, int4",
    ("novelty+int2", 0.2): "recall, int2",
    ("full+int4", None): "uniform int4",
    ("full+int2", None): "uniform int2",
    ("novelty", 0.4): "recommended",
    ("novelty", 0.2): "recommended",
    ("plphp", 0.4): "plphp",
    ("plphp", 0.2): "plphp",
    ("random", 0.4): "random",
    ("random", 0.2): "random",
    ("uniform", 0.4): "uniform top-k",
    ("uniform", 0.2): "uniform top-k",
}
HIDDEN = "recall, host, random at first"  # not drawn, because its line would be covered
SHOWN = {"refer": "short answers", "grid": "a page, word by word", "long": "long answers"}
WAYS = ("recall, host", "recall, int4", "recall, int2", "recommended")
Key = tuple[str, str, float | None]


def read(runs: Iterable[Path]) -> dict[Key, dict[str, Any]]:
    """The lines of all samples: (task, method, budget) -> id of the sample -> line."""
    found: dict[Key, dict[str, Any]] = defaultdict(dict)
    for run in runs:
        for path in sorted((run / "samples").glob("*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                if "id" in line:
                    found[line["task"], line["method"], line["budget"]][line["id"]] = line
    return found


def results(found: Mapping[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per task and setting: exact match relative to the full cache's, with an interval."""
    rows, rng = [], np.random.default_rng(0)
    for setting, name in {("full", 1.0): "full", **NAMES}.items():
        for task in TASKS:
            full, mine = found.get((task, "full", 1.0), {}), found.get((task, *setting), {})
            both = sorted({*full} & {*mine})
            if len(both) < LEAST:
                continue
            right = np.array([mine[i]["exact"] for i in both])
            base = np.array([full[i]["exact"] for i in both])
            drawn = rng.integers(0, len(both), (RESAMPLES, len(both)))
            low, high = np.percentile(right[drawn].mean(1) / base[drawn].mean(1), [2.5, 97.5])
            rows.append(
                {
                    "name": name, "method": setting[0], "budget": setting[1], "task": task,
                    "samples": len(both), "exact": round(float(right.mean()), 3),
                    "bytes": round(float(np.mean([mine[i]["kept"] for i in both])), 3),
                    "of_full": round(float(right.mean() / base.mean()), 3),
                    "interval": [round(float(low), 3), round(float(high), 3)],
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown: for each setting its device bytes and its result on every task."""
    lines = [f"| | device bytes | {' | '.join(TASKS)} |", f"|{'---|' * (len(TASKS) + 2)}"]
    for setting, name in {("full", 1.0): "full, exact match", **NAMES}.items():
        mine = {r["task"]: r for r in rows if (r["method"], r["budget"]) == setting}
        cells = [_cell(mine.get(task)) for task in TASKS]
        held = np.mean([row["bytes"] for row in mine.values()])
        lines.append(f"| {name} | {held:.0%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def overview(rows: list[dict[str, Any]]) -> str:
    """The table for users: right answers over the full cache's, without intervals."""
    lines = [f"| way | device bytes | {' | '.join(SHOWN.values())} |", "|---|---|---|---|---|"]
    for setting, name in NAMES.items():
        mine = {r["task"]: r for r in rows if (r["method"], r["budget"]) == setting}
        if name in WAYS:
            cells = " | ".join(f"{mine[task]['of_full']:.2f}" for task in SHOWN)
            held = np.mean([row["bytes"] for row in mine.values()])
            lines.append(f"| {name} | {held:.0%} | {cells} |")
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """The table of each page."""
    return {"recall.md": overview(rows), "recall-results.md": table(rows)}


def written(text: str, made: str) -> str:
    """A page's text with a table between its two comments."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.partition(END)[2]}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = row["interval"]
    whole = row["name"] == "full"
    return f"{row['exact']:.3f}" if whole else f"{row['of_full']:.2f} [{low:.2f}, {high:.2f}]"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw exact match relative to the full cache's by device bytes, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")  # no window system needed
    from matplotlib import pyplot as plt

    shown = dict.fromkeys(name for name in NAMES.values() if name != HIDDEN)
    colors = dict(zip(shown, plt.get_cmap("tab10").colors, strict=False))
    size = {"figsize": (12, 3.7), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(TASKS), sharey=True, **size)
    for panel, task in zip(panels, TASKS, strict=True):
        for name, color in colors.items():
            mine = [r for r in rows if r["task"] == task and r["name"] == name]
            mine.sort(key=lambda row: row["bytes"])
            at, height = [r["bytes"] for r in mine], [r["of_full"] for r in mine]
            spread = [[abs(r["of_full"] - r["interval"][side]) for r in mine] for side in (0, 1)]
            panel.errorbar(at, height, spread, fmt="o-", color=color, label=name, ms=4, lw=1)
        panel.axhline(0.97, color="#555555", lw=0.8, ls="--")
        panel.set_title(task)
        panel.set_xlim(0.1, 0.5)
        panel.set_xlabel("device bytes of vision K/V")
    panels[0].set_ylabel("exact match / that of the full cache")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, nargs="+", help="eval directories")
    chosen = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "results.json"
    if chosen.run:
        about = [json.loads((run / "run.json").read_text()) for run in chosen.run]
        if any(one != about[0] for one in about):
            raise SystemExit("these runs have different options, models or versions")
        found = {"about": about[0], "rows": results(read(chosen.run))}
        lines = ",\n".join(json.dumps(row) for row in found["rows"])
        path.write_text(f'{{"about": {json.dumps(found["about"])}, "rows": [\n{lines}\n]}}\n')
    rows = json.loads(path.read_text())["rows"]
    draw(rows, FOLDER / "accuracy.png")
    for name, made in tables(rows).items():
        page = FOLDER.parent / name
        page.write_text(written(page.read_text(), made))


if __name__ == "__main__":
    main()
