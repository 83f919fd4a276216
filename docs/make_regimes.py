"""Write the tables of docs/regimes.md from docs/accuracy/regimes.json: `make regimes-page`.

With --run DIR, the directory of a finished `plphp eval`, its results are copied first.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finished import results

DOCS = Path(__file__).parent
RESULTS = DOCS / "accuracy" / "regimes.json"
PAGE = DOCS / "regimes.md"
BEGIN, END = "<!-- by docs/make_regimes.py -->\n", "<!-- end -->"
SUITES = ("dense", "redundant-4", "redundant-16")
NAMES = {
    "plphp:paper": "PLPHP() as published",
    "plphp": "PLPHP",
    "novelty": "novelty (recommended)",
    "novelty+host": "novelty, recall `host`",
    "novelty+int4": "novelty, recall `int4`",
    "plphp+host": "PLPHP, recall `host`",
}

Rows = Sequence[Mapping[str, Any]]


def take_in(run: Path) -> dict[str, Any]:
    """What the page needs of a run: for every setting, the right answers of each task."""
    found, made = results(run)
    rows: dict[tuple[str, float | None], dict[str, Any]] = {}
    for name, task in found["tasks"].items():
        for one in task["settings"]:
            if "score" not in one:  # a method that cannot run on this task
                continue
            row = rows.setdefault(
                (one["method"], one["budget"]), {"right": {}, "kept": [], "bytes": []}
            )
            row["right"][name] = round(one["score"]["mean"], 3)
            row["kept"].append(one["kept"])
            row["bytes"].append(one["kv_bytes"] / one["kv_bytes_full"])
    return {
        "about": {**found["about"], **made},
        "rows": [
            {
                "method": method,
                "budget": budget,
                "kept": round(sum(row["kept"]) / len(row["kept"]), 3),
                "bytes": round(sum(row["bytes"]) / len(row["bytes"]), 3),
                "right": row["right"],
            }
            for (method, budget), row in rows.items()
        ],
    }


def tables(rows: Rows) -> str:
    """One table a suite: right answers by task, the best of each budget in bold."""
    return "\n".join(f"### {suite}\n\n{table(rows, suite)}\n" for suite in SUITES)


def table(rows: Rows, suite: str) -> str:
    """The tasks of a suite in columns, the settings in rows, by their mean over the tasks."""
    tasks = [name for name in rows[0]["right"] if name.endswith(f"@{suite}")]
    order = sorted(rows, key=lambda row: (-(row["budget"] or row["kept"]), -_mean(row, tasks)))
    lines = [
        "| method | kept | cache bytes |" + "".join(f" {t.split('@')[0]} |" for t in tasks),
        "|---|---|---|" + "---|" * len(tasks),
    ]
    for row in order:
        name = NAMES.get(row["method"], row["method"])
        right = "".join(f" {row['right'][task]:.2f} |" for task in tasks)
        lines.append(f"| {name} | {row['kept']:.0%} | {row['bytes']:.2f} |{right}")
    return "\n".join(lines)


def _mean(row: Mapping[str, Any], tasks: Sequence[str]) -> float:
    return float(sum(row["right"][task] for task in tasks) / len(tasks))


def of_full(rows: Rows, method: str, budget: float | None) -> tuple[float, float]:
    """The lowest and the highest share of the full cache's right answers over all tasks."""
    full = next(row for row in rows if row["method"] == "full")["right"]
    own = next(row for row in rows if (row["method"], row["budget"]) == (method, budget))["right"]
    shares = [own[task] / full[task] for task in full]
    return min(shares), max(shares)


def measured(about: Mapping[str, Any]) -> str:
    """When and on what the results were measured, in one sentence."""
    return (
        f"Measured on {about['date']} on {about['machine']} ({about['dtype']}, torch "
        f"{about['torch']}, transformers {about['transformers']}), with {about['limit']} samples "
        f"of each task and seed {about['seed']}.\n"
    )


def page(text: str, found: Mapping[str, Any]) -> str:
    """The page's text with the tables of the results in it, and what they were measured on."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    made = f"{BEGIN}{tables(found['rows'])}\n{measured(found['about'])}{END}"
    return re.sub(pattern, lambda _: made, text, flags=re.S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    run = parser.parse_args().run
    if run:
        RESULTS.write_text(json.dumps(take_in(run), indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    PAGE.write_text(page(PAGE.read_text(), found))
    for row in found["rows"]:
        low, high = of_full(found["rows"], row["method"], row["budget"])
        print(f"{row['method']} {row['budget']}: {low:.2f} to {high:.2f} of the full cache")


if __name__ == "__main__":
    main()
