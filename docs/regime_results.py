"""The results in docs/accuracy that docs/make_regimes.py makes pages of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finished import results

DOCS = Path(__file__).parent
RESULTS = DOCS / "accuracy" / "regimes.json"
BITS = DOCS / "accuracy" / "bits.json"
WAYS = DOCS / "accuracy" / "ways.json"
VIDEO = DOCS / "accuracy" / "video.json"
FIRST_TOKEN = DOCS / "accuracy" / "first-token.json"

Row = Mapping[str, Any]
Rows = Sequence[Row]


def take_in(run: Path) -> dict[str, Any]:
    """What the pages need of a run: for every setting, the results of each task."""
    found, made = results(run)
    rows: dict[tuple[str, float | None], dict[str, Any]] = {}
    for name, task in found["tasks"].items():
        for one in task["settings"]:
            if "score" not in one:  # a method that cannot run on this task
                continue
            row = rows.setdefault(
                (one["method"], one["budget"]), {"right": {}, "kept": {}, "bytes": {}}
            )
            row["right"][name] = round(one["score"]["mean"], 3)
            row["kept"][name] = round(one["kept"], 3)
            row["bytes"][name] = round(one["kv_bytes"] / one["kv_bytes_full"], 3)
    settings = [{"method": m, "budget": b, **row} for (m, b), row in rows.items()]
    return {"about": {**found["about"], **made}, "rows": settings}


def add(found: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Results with the cells that they lack, from another run. What is there stays.

    The run of such a cell is `row["run"][task]`: 0 is `about`, and the others are in `more`.
    Raises ValueError for a run on other samples, or in another number format.
    """
    for name in ("model", "dtype", "limit", "seed"):
        if found["about"][name] != new["about"][name]:
            raise ValueError(f"the run has another {name}: {new['about'][name]}")
    rows = {(row["method"], row["budget"]): row for row in found["rows"]}
    number = len(found.get("more", ())) + 1
    for one in new["rows"]:
        empty: dict[str, Any] = {"method": one["method"], "budget": one["budget"]}
        row = rows.setdefault((one["method"], one["budget"]), empty)
        lacks = [task for task in one["right"] if task not in row.get("right", {})]
        for what in ("right", "kept", "bytes"):
            row.setdefault(what, {}).update({task: one[what][task] for task in lacks})
        if lacks:
            row.setdefault("run", {}).update(dict.fromkeys(lacks, number))
    more = [*found.get("more", ()), new["about"]]
    return {"about": found["about"], "more": more, "rows": list(rows.values())}


def runs_of(found: Mapping[str, Any], rows: Rows, tasks: set[str]) -> list[Mapping[str, Any]]:
    """The settings of the runs that the cells of some tasks come from, oldest first."""
    runs = [found["about"], *found.get("more", ())]
    used = {
        row.get("run", {}).get(task, 0) for row in rows for task in row["right"] if task in tasks
    }
    return [about for number, about in enumerate(runs) if number in used]


def of_full(rows: Rows, method: str, budget: float | None) -> tuple[float, float]:
    """The lowest and the highest share of the full cache's right answers over a setting's tasks."""
    full = next(row for row in rows if row["method"] == "full")["right"]
    own = next(row for row in rows if (row["method"], row["budget"]) == (method, budget))["right"]
    shares = [right / full[task] for task, right in own.items()]
    return min(shares), max(shares)


def times() -> dict[tuple[str, float | None], float]:
    """The time to the first token of each setting over that of the full model."""
    rows = json.loads(FIRST_TOKEN.read_text())["rows"]
    return {(row["method"], row["budget"]): row["over_full"][0] for row in rows}


def measured(about: Mapping[str, Any]) -> str:
    """When and on what the results were measured, in one sentence."""
    return (
        f"Measured on {about['date']} on {about['machine']} ({about['dtype']}, torch "
        f"{about['torch']}, transformers {about['transformers']}), with {about['limit']} samples "
        f"of each task and seed {about['seed']}.\n"
    )


def timed_on(about: Mapping[str, Any]) -> str:
    """What the times to the first token were measured on, in one sentence."""
    low, _, high = about["vision_tokens"]
    return (
        f"First tokens: CPU seconds over those of the full model ({about['seconds']:.2f}) in "
        f"{about['prompts']} prompts of {low} to {high} vision tokens, median of {about['rounds']} "
        f"rounds, one thread, {about['date']}, {about['machine']}.\n"
    )
