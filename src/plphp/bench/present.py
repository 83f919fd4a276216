"""Files of a benchmark's result: JSON, tables in Markdown, and a figure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plphp._words import counted
from plphp.errors import InputError, how_to_install

Shown = Mapping[str, Any]
STEP, FITS = "A decode step", "What fits beside the weights"
RATIO = (
    "Ratio: the median over the rounds, with the least and the most; in each round the time over "
    "stock's time in the same round, so that it may differ from the quotient of the times shown."
)


def write(found: Shown, out: Path) -> None:
    """Write result.json, result.md and result.png. Raises InputError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "result.md").write_text(markdown(found))
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}: give a directory that can be made or written"
        ) from error
    _draw(found, out / "result.png")


def title(found: Shown) -> str:
    """The setting that was measured, in one line."""
    setting = found["setting"]
    shape = setting["shape"]
    rounded = f"{setting['weights']} weights, " if setting.get("weights") else ""
    return (
        f"{shape['name']}, {counted(shape['layers'], 'layer')}, {setting['dtype']}, {rounded}"
        f"{setting['context']:,} columns, batch {setting['batch']}, "
        f"keep {', '.join(f'{rate:g}' for rate in setting['keep'])}"
    )


def markdown(found: Shown) -> str:
    """The tables of a result, after the setting and the machine."""
    about, setting = found["about"], found["setting"]
    lines = [
        f"{title(found)}; {counted(setting['rounds'], 'round')} of "
        f"{setting['new_tokens']} tokens, A B A B.",
        "",
        f"{about['machine']}, Python {about['python']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, {about['date']}; copies move {found['copy_gb_s']} GB/s; energy: "
        f"{found['energy']}.",
    ]
    said = legends(found)
    for name, (header, rows) in sections(found).items():
        head = [name if column == header[0] else column for column in header]
        lines += ["", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
        lines += ["", *said[name]] if name in said else []
    return "\n".join(lines) + "\n"


def legends(found: Shown) -> dict[str, list[str]]:
    """Sentences that explain the words of a table, by the name of the table."""
    from plphp.bench.variants import MEANINGS

    names = [row["name"] for row in found["steps"]]
    return {
        STEP: [
            *(f"{name}: {MEANINGS[name]}." for name in names if name in MEANINGS),
            RATIO,
            f"Bound: the least time, in which the bytes of the weights and of the keys and values "
            f"are read at {found['copy_gb_s']} GB/s. Energy: {found['energy']}.",
        ],
        FITS: ["Memory alone is counted: a model reads no more tokens than it has positions."],
    }


# What a token costs: energy where it can be read, elsewhere the time of all cores together.
SPENT = {"joules_per_token": "J a token", "cpu_seconds_per_token": "CPU s a token"}
Rows = tuple[list[str], list[list[str]]]  # the header and the cells of every row


def sections(found: Shown) -> dict[str, Rows]:
    """The tables of a result by name."""
    made: dict[str, Rows] = {STEP: _steps(found["steps"])}
    made["Cache and attention of all layers, a step"] = _ratios(found["attention"])
    if found["prefill"]:
        made["The prompt"] = _ratios(found["prefill"])
    made["Scoring, choosing and compacting a prompt"] = _pruning(found)
    made[FITS] = capacity_table(
        found["fits"], found["setting"]["context"], found["setting"]["batch"]
    )
    return made


def _steps(steps: Sequence[Shown]) -> Rows:
    header = ["cache", "ms", "ratio to stock", "KV MiB", "bound ms", "bound / ms"]
    spent = next((name for name in SPENT if steps[0].get(name) is not None), None)
    rows = []
    for row in steps:
        cells = [row["name"], f"{row['ms']:.2f}", _ratio(row)]
        cells += [_mebibytes(row["kv_bytes"]), f"{row['bound_ms']:.2f}", f"{row['of_bound']:.0%}"]
        rows.append([*cells, f"{row[spent]:.3f}"] if spent else cells)
    return [*header, SPENT[spent]] if spent else header, rows


def _ratios(found: Sequence[Shown]) -> Rows:
    peaks = "peak_bytes" in found[0]
    header = ["cache", "ms", "ratio to stock", *(["peak MiB"] if peaks else [])]
    rows = [[row["name"], f"{row['ms']:.2f}", _ratio(row)] for row in found]
    if peaks:
        rows = [
            [*cells, _mebibytes(row["peak_bytes"])] for cells, row in zip(rows, found, strict=True)
        ]
    return header, rows


def _pruning(found: Shown) -> Rows:
    spent = found["pruning_ms"]
    cells = ["all layers", f"{spent['median']:.2f} ({spent['least']:.2f} - {spent['most']:.2f})"]
    if not found["prefill"]:
        return ["", "ms"], [cells]
    whole = next(row["ms"] for row in found["prefill"] if row["name"] == "stock")
    return ["", "ms", "of the prompt"], [[*cells, f"{spent['median'] / whole:.2%}"]]


def capacity_table(fits: Sequence[Shown], context: int, batch: int) -> Rows:
    """The table of the results of `plphp.bench.capacity.fits`, one per memory size."""
    header = ["GiB", f"tokens x {batch}, full", "pruned", f"rows of {context:,}, full", "pruned"]
    return header, [
        [f"{row['memory_bytes'] / 2**30:g}"]
        + [f"{row[what][side]:,}" for what in ("context", "batch") for side in ("full", "pruned")]
        for row in fits
    ]


def _mebibytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.1f}"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ratio(row: Shown) -> str:
    middle, low, high = row["over_stock"]
    return "1" if row["name"] == "stock" else f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _draw(found: Shown, path: Path) -> None:
    """Draw the milliseconds of a step as bars, and its bound as a mark in each."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"--out draws a picture: {how_to_install('eval')}") from None
    matplotlib.use("Agg")  # no window system needed
    from matplotlib import pyplot as plt

    rows = found["steps"][::-1]
    figure, axes = plt.subplots(figsize=(7, 0.6 * len(rows) + 1.2), layout="constrained")
    names = [row["name"] for row in rows]
    errors = [
        [row["ms"] - row["ms_quartiles"][0] for row in rows],
        [row["ms_quartiles"][1] - row["ms"] for row in rows],
    ]
    axes.barh(names, [row["ms"] for row in rows], xerr=errors, color="#88ccee", ecolor="#555555")
    for place, row in enumerate(rows):
        axes.plot([row["bound_ms"]] * 2, [place - 0.4, place + 0.4], color="#cc3311")
    axes.set_xlabel("milliseconds per decoding step, median and quartiles; red: the bound")
    figure.savefig(path, dpi=120)
    plt.close(figure)
