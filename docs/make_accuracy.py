"""Write docs/accuracy.md from docs/accuracy/summary.json: `make accuracy-page`.

With --run DIR, the directory of a finished `plphp eval`, its summary and curves are copied first.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from finished import results

from plphp.eval.summary import COMPARED
from plphp.eval.tables import interval, number

DOCS = Path(__file__).parent
FOLDER = DOCS / "accuracy"
BUDGETS = (0.6, 0.4, 0.2, 0.1)
SHORT = 0.2  # the budget of tables with a single one
SEEN = ("full", "random", "uniform", "plphp", "vl-cache", "novelty")  # methods of the overview
PLPHP = "plphp"
OFF = 0.02  # a cell gives the kept share if it differs from the budget by more
MEASURES = ("same", "exact", "words", "anls", "rouge_l", "cider", "wer")

Shown = Mapping[str, Any]


def take_in(run: Path, command: str) -> None:
    """Copy the results of a run, and add the machine, the versions, the date and the command."""
    found, made = results(run)
    found["made"] = {
        "command": f"`{command}`",
        **made,
        "python": platform.python_version(),
        **{name: str(value) for name, value in found["about"].items()},
    }
    FOLDER.mkdir(exist_ok=True)
    # One line per task, so that a diff shows which tasks changed.
    (FOLDER / "summary.json").write_text(_by_task(found))
    for picture in run.glob("*.png"):
        shutil.copy(picture, FOLDER / picture.name)


def page(folder: Path = FOLDER) -> str:
    """The page that the committed results give."""
    summary = json.loads((folder / "summary.json").read_text())
    tasks: dict[str, Any] = summary["tasks"]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["capitalized"] = lambda text: text[:1].upper() + text[1:]
    apart = sum(task["one_token"] for task in tasks.values())
    text = environment.get_template("page.md.jinja").render(
        made=summary["made"],
        apart=f"{apart} of {sum(t['samples'] + t['one_token'] for t in tasks.values())} samples",
        overview=_overview(tasks),
        short=_short(tasks),
        short_budget=SHORT,
        tally=_tally(tasks),
        tasks={name: _task(name, task, folder) for name, task in tasks.items()},
        findings=(folder / "findings.md").read_text().strip(),
        methods=_methods(summary["policies"]),
        skipped=_skipped_everywhere(tasks),
        percent=percent,
    )
    return text.rstrip() + "\n"


def percent(share: float) -> str:
    return f"{share:.0%}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _task(name: str, task: Shown, folder: Path) -> dict[str, Any]:
    figure = folder / f"curves-{name}.png"
    return {
        "what": task["what"],
        "head": (
            f"{task['samples']} samples, on average {task['vision_tokens']:.0f} vision tokens and "
            f"{task['answer_tokens']:.0f} answer tokens. Score: {task['metric']}."
        ),
        "scores": _scores(task),
        "verdicts": list(_verdicts(task)),
        "skipped": list(_skipped(task)),
        "measures": _measures(task),
        "pictures": _pictures(task),
        "figure": f"accuracy/{figure.name}" if figure.exists() else None,
    }


def _cells(task: Shown) -> dict[tuple[str, float | None], Shown]:
    return {(row["method"], row["budget"]): row for row in task["settings"]}


def _names(task: Shown) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in task["settings"]))


def _scores(task: Shown) -> str:
    cells = _cells(task)
    whole = interval(cells["full", 1.0]["score"], 2)
    rows = []
    for name in _names(task):
        if (name, None) in cells:  # default options: the column of the nearest budget
            row = cells[name, None]
            near = min(BUDGETS, key=lambda b: abs(b - row.get("kept", 1.0)))
            given: list[Shown | None] = [row if budget == near else None for budget in BUDGETS]
        else:
            given = [cells.get((name, budget)) for budget in BUDGETS]
        full = whole if name == "full" else ""
        rows.append([name, full, *(_cell(row, b) for row, b in zip(given, BUDGETS, strict=True))])
    return table(["kept", "100%", *map(percent, BUDGETS)], rows)


def _cell(row: Shown | None, budget: float) -> str:
    if row is None:
        return ""
    if "skipped" in row:
        return "cannot"
    off = f" ({row['kept']:.0%} kept)" if abs(row["kept"] - budget) > OFF else ""
    return interval(row["score"], 2) + off


def _verdicts(task: Shown) -> Iterator[str]:
    """One sentence per control: the verdicts of PLPHP by budget."""
    cells = _cells(task)
    for other in COMPARED:
        by: dict[str, list[str]] = {}
        for budget in BUDGETS:
            found = cells.get((PLPHP, budget), {}).get("paired", {}).get(other)
            if found:
                text = f"{percent(budget)} ({found['mean']:+.2f})"
                by.setdefault(found["verdict"], []).append(text)
        if by:
            said = "; ".join(f"{verdict} at {', '.join(at)}" for verdict, at in by.items())
            yield f"PLPHP against `{other}`: {said}."


def _overview(tasks: Shown) -> str:
    """The score of a few methods at the budget SHORT, one row for each task."""
    rows = []
    for name, task in tasks.items():
        cells = _cells(task)
        found = [cells.get((method, 1.0 if method == "full" else SHORT)) for method in SEEN]
        scores = [f"{row['score']['mean']:.2f}" if row else "" for row in found]
        rows.append([f"[{name}](#{name})", f"{task['answer_tokens']:.0f}", *scores])
    return table(["task", "tokens of an answer", *SEEN], rows)


def _short(tasks: Shown) -> str:
    """The number of tasks of each verdict of PLPHP, by control and budget."""
    rows = []
    for other in COMPARED:
        counts = [_count(tasks, PLPHP, other, budget) for budget in BUDGETS]
        if any(counts):
            rows.append([other, *counts])
    return table(["PLPHP against", *map(percent, BUDGETS)], rows)


def _tally(tasks: Shown) -> str:
    """The number of tasks of each verdict at the budget SHORT, by method and control."""
    methods = dict.fromkeys(name for task in tasks.values() for name in _names(task))
    rows = []
    for name in methods:
        counts = [_count(tasks, name, other, SHORT) for other in COMPARED]
        if any(counts):
            rows.append([name, *(counts)])
    return table(["method", *COMPARED], rows)


def _count(tasks: Shown, name: str, other: str, budget: float) -> str:
    """Tasks on which a method wins / shows no difference / loses; empty if it was not compared."""
    verdicts = []
    for task in tasks.values():
        cells = _cells(task)
        row = cells.get((name, budget), cells.get((name, None), {}))
        if found := row.get("paired", {}).get(other):
            verdicts.append(found["verdict"])
    kinds = ("wins", "no difference shown", "loses")
    return " / ".join(str(verdicts.count(kind)) for kind in kinds) if verdicts else ""


def _measures(task: Shown) -> str:
    rows = []
    for row in task["settings"]:
        if "skipped" not in row and row["budget"] in (1.0, SHORT, None):
            metrics = [number(row["metrics"].get(name)) for name in MEASURES]
            cache = f"{row['kv_bytes'] / row['kv_bytes_full']:.2f}"
            rows.append([row["method"], percent(row["kept"]), cache, *metrics,
                         number(row["agreement"]), number(row["kl"])])  # fmt: skip
    names = [name.replace("_", "-").upper() if name in MEASURES[3:] else name for name in MEASURES]
    return table(["method", "kept", "cache bytes, of full", *names, "agreement", "KL"], rows)


def _pictures(task: Shown) -> str:
    """The score by number of images, for tasks with different numbers."""
    shown = [
        row for row in task["settings"]
        if "skipped" not in row and row["budget"] in (1.0, SHORT) and len(row["by_pictures"]) > 1
    ]  # fmt: skip
    if not shown:
        return ""
    counts = list(shown[0]["by_pictures"])
    rows = [
        [row["method"], *(f"{row['by_pictures'][count]['mean']:.2f}" for count in counts)]
        for row in shown
    ]
    samples = [f"{count} (n {shown[0]['by_pictures'][count]['n']})" for count in counts]
    return table(["images", *samples], rows)


def _skipped(task: Shown) -> Iterator[str]:
    """One sentence per reason: the methods that could not run, and the budgets."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in task["settings"]:
        if "skipped" in row:
            reason = re.sub(r", got [\d.]+", "", row["skipped"])  # the budgets are named anyway
            budgets = reasons.setdefault(reason, {}).setdefault(row["method"], [])
            budgets += [] if row["budget"] is None else [percent(row["budget"])]
    for reason, methods in reasons.items():
        names = [f"`{name}`{f' at {_list(at)}' if at else ''}" for name, at in methods.items()]
        yield f"{_list(names)}: {reason}."


def _skipped_everywhere(tasks: Shown) -> list[str]:
    """The sentences of `_skipped` that hold for all tasks."""
    first, *others = ([*_skipped(task)] for task in tasks.values())
    return [sentence for sentence in first if all(sentence in other for other in others)]


def _methods(policies: Mapping[str, str]) -> str:
    """The options of each method: one line if they differ in the budget only."""
    budgets = re.compile(r"(?<=budget=)[\d.]+")
    rows: list[Sequence[str]] = []
    for method, group in groupby(policies.items(), key=lambda item: item[0].partition(" at ")[0]):
        settings = dict(group)
        alike = {budgets.sub("...", options) for options in settings.values()}
        if len(alike) == 1 < len(settings):
            settings = {method: alike.pop()}
        rows += [[f"`{name}`", f"`{options}`"] for name, options in settings.items()]
    return table(["method", "options"], rows)


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _by_task(found: Shown) -> str:
    head = {name: value for name, value in found.items() if name != "tasks"}
    lines = [f"{json.dumps(name)}: {json.dumps(task)}" for name, task in found["tasks"].items()]
    return json.dumps(head, indent=1)[:-2] + ',\n "tasks": {\n' + ",\n".join(lines) + "\n }\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="directory of a finished run")
    parser.add_argument("--command", default="make accuracy", help="how the run was made")
    options = parser.parse_args()
    if options.run:
        take_in(options.run, options.command)
    (DOCS / "accuracy.md").write_text(page())


if __name__ == "__main__":
    main()
