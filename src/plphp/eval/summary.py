"""The summary of a run: scores with intervals, paired differences, and means of other measures.

Intervals are 95 % percentile bootstraps over samples. All settings of a task use the same
resamples, so that ratios and differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plphp.eval.cider import cider
from plphp.eval.methods import CONTROLS, FULL, Setting, known_methods
from plphp.eval.metrics import TEXT_METRICS
from plphp.eval.store import Line, read_json, read_lines, read_tasks
from plphp.eval.tasks import TASKS

Floats = NDArray[np.float64]

RESAMPLES, SEED = 2000, 0
COMPARED = ("random", "uniform", "plphp-shared", "downsample")  # each method is compared with them
AGREEMENT = "agreement"  # the main metric of tasks without reference answers
FEW = 0.2  # KL by position ends where a smaller share of the answers is that long


@dataclass(frozen=True)
class Rows:
    """The lines of one setting, one per sample in the order of the task.

    metric: the main metric of the task
    """

    setting: Setting
    lines: Sequence[Line]
    metric: str

    @cached_property
    def scores(self) -> Floats:
        return np.array([self.value(line, self.metric) for line in self.lines])

    @staticmethod
    def value(line: Line, metric: str) -> float:
        """The value of one metric in a line; agreement and KL are means from the second token on.

        The first token comes from the prompt's forward, which does not change when a cache is
        pruned.
        """
        if metric == AGREEMENT:
            return _mean(line["agree"][1:]) if "agree" in line else 1.0
        if metric == "kl":
            return _mean(line["kl"][1:]) if "kl" in line else 0.0
        return float(line[metric])


def summarize(out: Path) -> dict[str, Any]:
    """The summary of a run in the directory `out`, as JSON values. No model is needed."""
    found: dict[str, Any] = {"about": read_json(out / "run.json")}
    found["policies"] = read_json(out / "policies.json")
    tasks = {task["task"]: task for task in read_tasks(out)}
    ordered = sorted(tasks, key=lambda name: (list(TASKS) + list(tasks)).index(name))
    found["tasks"] = {name: _task(tasks[name], list(read_lines(out, name))) for name in ordered}
    return found


def missing(out: Path, settings: Sequence[Setting], tasks: Sequence[str]) -> int:
    """The number of lines that a run lacks. A setting that could not run lacks none."""
    wanted = 0
    for task in read_tasks(out):
        if task["task"] not in tasks:
            continue
        lines = list(read_lines(out, task["task"]))
        failed = {_setting(line) for line in lines if "skipped" in line}
        have = {(line["id"], _setting(line)) for line in lines if "id" in line}
        wanted += sum(
            (sample["id"], setting) not in have
            for setting in settings
            if setting not in failed
            for sample in task["samples"]
        )
    return wanted


def _task(task: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any]:
    samples = {sample["id"]: sample for sample in task["samples"]}
    by: dict[Setting, dict[str, Line]] = {}
    reasons = {_setting(line): line["skipped"] for line in lines if "skipped" in line}
    for line in lines:
        if "id" in line:
            by.setdefault(_setting(line), {})[line["id"]] = line
    full = by[FULL]
    # An answer of one token comes from the unpruned prompt, so it does not depend on the method
    # and is reported separately.
    apart = [name for name in samples if full[name]["one_token"]]
    names = [name for name in samples if not full[name]["one_token"]]
    metric = task["metric"] or AGREEMENT
    settings = sorted(by | reasons, key=_order)
    rows = {
        setting: Rows(setting, [by[setting][name] for name in names], metric)
        for setting in settings
        if len(by.get(setting, ())) == len(samples) and names
    }
    shown = _settings(rows, [samples[name] for name in names]) if names else {}
    for setting in settings:
        if setting not in shown:
            reason = reasons.get(setting, "not finished" if names else "answers of one token")
            shown[setting] = {"skipped": reason}
        elif apart and metric != AGREEMENT:
            alone = [by[setting][name][metric] for name in apart]
            shown[setting]["one_token"] = {"n": len(apart), "mean": _round(np.mean(alone))}
    return {
        "what": task["what"],
        "metric": metric,
        "samples": len(names),
        "one_token": len(apart),
        "vision_tokens": _round(np.mean([full[name]["vision"] for name in samples])),
        "answer_tokens": _round(np.mean([full[name]["tokens"] for name in samples])),
        "settings": [{"method": s.method, "budget": s.budget, **shown[s]} for s in settings],
    }


def _settings(
    rows: Mapping[Setting, Rows], samples: Sequence[Mapping[str, Any]]
) -> dict[Setting, dict[str, Any]]:
    count = len(samples)
    rng = np.random.default_rng(SEED)
    weights = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) / count
    means = {setting: weights @ found.scores for setting, found in rows.items()}
    shown = {}
    for setting, found in rows.items():
        mean, whole = found.scores.mean(), rows[FULL].scores.mean()
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = means[setting] / means[FULL]
        shown[setting] = {
            "score": _interval(mean, means[setting]),
            "relative": _interval(mean / whole, ratio) if whole and means[FULL].all() else None,
            "paired": _paired(setting, rows, means),
            **_plain(found, samples),
        }
    return shown


def _paired(
    setting: Setting, rows: Mapping[Setting, Rows], means: Mapping[Setting, Floats]
) -> dict[str, Any]:
    """The differences to the methods of `COMPARED` at the same budget.

    A method with default options, and no budget, is compared at the largest budget that does not
    exceed its kept share.
    """
    if setting == FULL:
        return {}
    budget = setting.budget
    if budget is None:
        kept = np.mean([line["kept"] for line in rows[setting].lines])
        budgets = {other.budget for other in rows if other != FULL and other.budget is not None}
        budget = max((b for b in budgets if b <= kept + 0.02), default=None)
    found: dict[str, Any] = {}
    for name in COMPARED:
        other = Setting(name, budget)
        if other in rows and other != setting:
            difference = rows[setting].scores.mean() - rows[other].scores.mean()
            interval = _interval(difference, means[setting] - means[other])
            found[name] = {**interval, "budget": budget, "verdict": _verdict(interval)}
    return found


def _verdict(interval: Mapping[str, float]) -> str:
    if interval["low"] > 0:
        return "wins"
    return "loses" if interval["high"] < 0 else "no difference shown"


def _plain(rows: Rows, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values that have no interval."""
    lines = rows.lines
    known = [name for name in (*TEXT_METRICS, "same") if name in lines[0]]
    metrics = {name: _round(np.mean([line[name] for line in lines])) for name in known}
    if samples[0]["answers"]:
        texts = [line["answer"] for line in lines]
        metrics["cider"] = _round(np.mean(cider(texts, [s["answers"] for s in samples])))
    return {
        "n": len(lines),
        "metrics": metrics,
        "agreement": _average([Rows.value(line, AGREEMENT) for line in lines]),
        "kl": _average([Rows.value(line, "kl") for line in lines]),
        "kl_by_position": _by_position([line.get("kl", []) for line in lines]),
        "kept": _round(np.mean([line["kept"] for line in lines])),
        "kv_bytes": round(float(np.mean([line["kv_bytes"] for line in lines]))),
        "kv_bytes_full": round(float(np.mean([line["kv_bytes_full"] for line in lines]))),
        "by_pictures": _by_pictures(rows, samples),
    }


def _by_pictures(rows: Rows, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    pictures = np.array([sample["pictures"] for sample in samples])
    return {
        str(count): {
            "n": int((pictures == count).sum()),
            "mean": _round(rows.scores[pictures == count].mean()),
        }
        for count in sorted(set(pictures.tolist()))
    }


def _by_position(values: Sequence[Sequence[float]]) -> list[float]:
    """The mean at each position, from the first token on, over the answers that are that long."""
    means = []
    for position in range(max(map(len, values))):
        there = [row[position] for row in values if len(row) > position]
        if len(there) < max(FEW * len(values), 1):
            break
        means.append(float(f"{np.mean(there):.3g}"))
    return means


def _interval(mean: float, resampled: Floats) -> dict[str, float]:
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"mean": _round(mean), "low": _round(low), "high": _round(high)}


def _setting(line: Line) -> Setting:
    return Setting(line["method"], line["budget"])


def _order(setting: Setting) -> tuple[int, float, str]:
    """A sort key: full cache, controls, other methods as registered; large budgets first."""
    names = [*CONTROLS, *(name for name in known_methods() if name not in CONTROLS)]
    place = names.index(setting.method) if setting.method in names else len(names)
    return place, -(setting.budget or 2.0), setting.method


def _average(values: Sequence[float]) -> float | None:
    """The mean of the values that are not NaN; a one-token answer has no values and is NaN."""
    known = [value for value in values if value == value]
    return _round(np.mean(known)) if known else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _round(value: Any) -> float:
    """Round to six significant digits; later digits depend on the order of summation."""
    return float(f"{float(value):.6g}")
