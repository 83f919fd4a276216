"""Curves of a summary, as PNG files: score against the share of vision K/V that the device holds.

Colours are Paul Tol's, told apart by colour-blind readers; markers tell the rest. The controls,
random and uniform, are grey and in every panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")  # no window system needed; the package draws only into files
from matplotlib import pyplot as plt

Shown = Mapping[str, Any]
Look = tuple[str, str, str]  # colour, line style, marker

PALETTE = (
    "#cc3311", "#0077bb", "#009988", "#ee7733", "#33bbee", "#ee3377", "#332288", "#117733",
    "#999933", "#882255", "#aa4499", "#ddaa33", "#bbbb00", "#004488",
)  # fmt: skip
MARKERS = "osD^vP*X<>hdp8"
VARIANT = {":paper": ("", "H"), ":calibrated": ("-.", "d")}  # in the colour of their method
GREY = {"random": ("#999999", "--"), "uniform": ("#555555", ":")}
METHOD: Look = ("#0077bb", "-", "o")  # where a panel has one method
LABELS = {"exact": "exact match", "vqa": "VQA accuracy", "words": "words in place"}
ACROSS = 4  # panels side by side
KL_AT = 0.2  # the budget whose KL is drawn by position
LEAST = 1e-3  # nats; what is less is drawn there, on a logarithmic axis


def draw(summary: Shown, out: Path) -> list[Path]:
    """curves.png, kl.png and curves-TASK.png in a directory; returns what was written."""
    tasks = {name: task for name, task in summary["tasks"].items() if _points(task)}
    if not tasks:
        return []
    looks = _looks(tasks.values())
    made = [_overview(tasks, looks, out / "curves.png"), _kl(tasks, looks, out / "kl.png")]
    for name, task in tasks.items():
        if not set(_points(task)) <= set(GREY):
            made.append(_one_task(name, task, out / f"curves-{name}.png"))
    return made


def _overview(tasks: Mapping[str, Shown], looks: Shown, path: Path) -> Path:
    """One panel a task, all methods in it; bands for the controls only, or nothing is seen."""
    figure, panels = _panels(len(tasks))
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        for method, rows in _points(task).items():
            _line(axes, task, rows, looks[method], band=method in GREY, label=method)
        axes.set_title(name, fontsize=10)
        _frame(axes, task)
    return _save(figure, panels, path)


def _one_task(name: str, task: Shown, path: Path) -> Path:
    """One panel a method, with its band, before the controls."""
    points = _points(task)
    methods = [method for method in points if method not in GREY]
    figure, panels = _panels(len(methods))
    for axes, method in zip(panels, methods, strict=False):
        for control in GREY:
            if control in points:
                _line(axes, task, points[control], (*GREY[control], ""), band=True, label=control)
        _line(axes, task, points[method], METHOD, band=True, label="the method")
        axes.set_title(method, fontsize=10)
        _frame(axes, task)
    figure.suptitle(name, fontsize=12)
    return _save(figure, panels, path)


def _kl(tasks: Mapping[str, Shown], looks: Shown, path: Path) -> Path:
    """KL from the unpruned model, summed along its own answer: how fast both part. By task."""
    figure, panels = _panels(len(tasks))
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        for row in _rows(task):
            if row["budget"] == KL_AT and row["method"] in looks:
                color, style, _ = looks[row["method"]]
                values = [max(value, LEAST) for value in accumulate(row["kl_by_position"])]
                axes.plot(range(1, len(values) + 1), values, style, color=color,
                          linewidth=1.4, label=row["method"])  # fmt: skip
        axes.set_yscale("log")
        axes.set_title(f"{name}, {KL_AT:.0%} kept", fontsize=10)
        axes.set(xlabel="token of the answer", ylabel="sum of KL, nats")
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, panels, path)


def _line(
    axes: Any,
    task: Shown,
    rows: Sequence[Shown],
    look: tuple[str, str, str],
    band: bool,
    label: str,
) -> None:
    """A method's points, joined with the full cache if it was run at several budgets."""
    color, style, marker = look
    full = next(row for row in task["settings"] if row["method"] == "full")
    points = sorted([*rows, full] if len(rows) > 1 else rows, key=lambda row: float(row["kept"]))
    x = [row["kept"] for row in points]
    mean, low, high = ([row["score"][name] for row in points] for name in ("mean", "low", "high"))
    axes.plot(x, mean, style, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
    if band and len(x) == 1:
        axes.vlines(x, low, high, color=color, linewidth=1.4)
    elif band:
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)


def _frame(axes: Any, task: Shown) -> None:
    axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.04))
    axes.set_xlabel("vision K/V on the device", fontsize=8)
    axes.set_ylabel(LABELS.get(task["metric"], task["metric"]), fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _panels(count: int) -> tuple[Any, list[Any]]:
    across = min(count, ACROSS)
    down = -(-count // across)
    figure, grid = plt.subplots(
        down, across, figsize=(3.1 * max(across, 2), 2.6 * down + 0.9), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    panels = list(grid.flat)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels


def _save(figure: Any, panels: Sequence[Any], path: Path) -> Path:
    """One legend for all panels, below them; each name once."""
    named = {
        label: handle
        for axes in panels
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(), named.keys(), loc="outside lower center", ncols=6, fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    # A palette holds lines and bands in half the bytes.
    Image.open(path).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)
    return path


def _rows(task: Shown) -> Iterator[Shown]:
    yield from (row for row in task["settings"] if "skipped" not in row)


def _points(task: Shown) -> dict[str, list[Shown]]:
    """Method -> its rows, without the full cache."""
    found: dict[str, list[Shown]] = {}
    for row in _rows(task):
        if row["method"] != "full":
            found.setdefault(row["method"], []).append(row)
    return found


def _looks(tasks: Any) -> dict[str, Look]:
    """Method -> colour, line style, marker; the same in every figure."""
    methods = dict.fromkeys(method for task in tasks for method in _points(task))
    bases = dict.fromkeys(method.partition(":")[0] for method in methods if method not in GREY)
    looks: dict[str, Look] = {name: (*GREY[name], "") for name in methods if name in GREY}
    for i, base in enumerate(bases):
        color = PALETTE[i % len(PALETTE)]
        looks[base] = (color, "-", MARKERS[i % len(MARKERS)])
        looks |= {f"{base}{end}": (color, *style) for end, style in VARIANT.items()}
    return looks
