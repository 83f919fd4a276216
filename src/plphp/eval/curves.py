"""Curves of a summary as PNG files: score against the share of vision K/V that the device holds.

The colours are Paul Tol's, which colour-blind readers can distinguish; markers help. The controls,
random and uniform, are grey and appear in every panel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

matplotlib.use("Agg")  # no window system is needed, because figures are only written to files
from matplotlib import pyplot as plt

Shown = Mapping[str, Any]
Style = tuple[str, str, str]  # colour, line style, marker

PALETTE = (
    "#cc3311", "#0077bb", "#009988", "#ee7733", "#33bbee", "#ee3377", "#332288", "#117733",
    "#999933", "#882255", "#aa4499", "#ddaa33", "#bbbb00", "#004488",
)  # fmt: skip
MARKERS = "osD^vP*X<>hdp8"
VARIANT = {":paper": ("", "H"), ":calibrated": ("-.", "d")}  # variants have their method's colour
GREY = {"random": ("#999999", "--"), "uniform": ("#555555", ":")}
METHOD: Style = ("#0077bb", "-", "o")  # used in panels with one method
LABELS = {"exact": "exact match", "vqa": "VQA accuracy", "words": "words in place"}
ACROSS = 4  # panels side by side
KL_AT = 0.2  # the budget of the figure of KL by position
LEAST = 1e-3  # nats; smaller values are drawn at this value, because the axis is logarithmic


def draw(summary: Shown, out: Path) -> list[Path]:
    """Write curves.png, kl.png and curves-TASK.png into a directory, and return their paths."""
    tasks = {name: task for name, task in summary["tasks"].items() if _points(task)}
    if not tasks:
        return []
    styles = _styles(tasks.values())
    made = [_overview(tasks, styles, out / "curves.png"), _kl(tasks, styles, out / "kl.png")]
    for name, task in tasks.items():
        if not set(_points(task)) <= set(GREY):
            made.append(_one_task(name, task, out / f"curves-{name}.png"))
    return made


def _overview(tasks: Mapping[str, Shown], styles: Shown, path: Path) -> Path:
    """One panel per task with all methods. Only the controls have a band: more are unreadable."""
    figure, panels = _panels(len(tasks))
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        for method, rows in _points(task).items():
            _line(axes, task, rows, styles[method], band=method in GREY, label=method)
        axes.set_title(name, fontsize=10)
        _frame(axes, task)
    return _save(figure, panels, path)


def _one_task(name: str, task: Shown, path: Path) -> Path:
    """One panel per method, with its interval and the controls."""
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


def _kl(tasks: Mapping[str, Shown], styles: Shown, path: Path) -> Path:
    """One panel per task: KL(full || pruned), summed over the tokens of the unpruned answer."""
    figure, panels = _panels(len(tasks))
    for axes, (name, task) in zip(panels, tasks.items(), strict=False):
        for row in _rows(task):
            if row["budget"] == KL_AT and row["method"] in styles:
                color, style, _ = styles[row["method"]]
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
    style: Style,
    band: bool,
    label: str,
) -> None:
    """Draw a method's points, connected to the full cache if there are several budgets."""
    color, line, marker = style
    full = next(row for row in task["settings"] if row["method"] == "full")
    points = sorted([*rows, full] if len(rows) > 1 else rows, key=lambda row: float(row["kept"]))
    x = [row["kept"] for row in points]
    mean, low, high = ([row["score"][name] for row in points] for name in ("mean", "low", "high"))
    axes.plot(x, mean, line, color=color, marker=marker, markersize=4, linewidth=1.4, label=label)
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
    """Write the figure, with one legend for all panels below them."""
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
    # A palette of 256 colours halves the file.
    Image.open(path).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)
    return path


def _rows(task: Shown) -> Iterator[Shown]:
    yield from (row for row in task["settings"] if "skipped" not in row)


def _points(task: Shown) -> dict[str, list[Shown]]:
    """The rows of each method by name, without the full cache."""
    found: dict[str, list[Shown]] = {}
    for row in _rows(task):
        if row["method"] != "full":
            found.setdefault(row["method"], []).append(row)
    return found


def _styles(tasks: Any) -> dict[str, Style]:
    """The style of each method by name, the same in all figures."""
    methods = dict.fromkeys(method for task in tasks for method in _points(task))
    bases = dict.fromkeys(method.partition(":")[0] for method in methods if method not in GREY)
    styles: dict[str, Style] = {name: (*GREY[name], "") for name in methods if name in GREY}
    for i, base in enumerate(bases):
        color = PALETTE[i % len(PALETTE)]
        styles[base] = (color, "-", MARKERS[i % len(MARKERS)])
        styles |= {f"{base}{end}": (color, *rest) for end, rest in VARIANT.items()}
    return styles
