"""A benchmark's result as files: numbers, a table, a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plphp.errors import InputError

Shown = Mapping[str, Any]


def write(found: Shown, out: Path) -> None:
    """result.json, result.md and result.png in a directory. Raises InputError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "result.md").write_text(markdown(found))
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error
    _draw(found, out / "result.png")


def markdown(found: Shown) -> str:
    """The tables of a result, with what they were measured on."""
    about, setting = found["about"], found["setting"]
    shape = setting["shape"]
    keep = ", ".join(f"{rate:g}" for rate in setting["keep"])
    lines = [
        f"{shape['name']}, {shape['layers']} layers, {setting['dtype']}, {setting['context']:,} "
        f"columns x {setting['batch']}, keep {keep}; {setting['rounds']} rounds of "
        f"{setting['new_tokens']} tokens, A B A B.",
        "",
        f"{about['machine']}, Python {about['python']}, torch {about['torch']}, transformers "
        f"{about['transformers']}, {about['date']}; copies move {found['copy_gb_s']} GB/s; energy: "
        f"{found['energy']}.",
        "",
        "| cache | ms a step | quartiles | over stock | KV bytes | bound ms | of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['ms']:.2f} | {row['ms_quartiles'][0]:.2f} - "
        f"{row['ms_quartiles'][1]:.2f} | {_ratio(row)} | {row['kv_bytes']:,} | "
        f"{row['bound_ms']:.2f} | {row['of_bound']:.0%} |"
        for row in found["steps"]
    ]
    for name, title in (("attention", "cache and attention of all layers"), ("prefill", "prompt")):
        if found[name]:
            lines += ["", f"| {title} | ms | over stock |", "|---|---|---|"]
            lines += [f"| {r['name']} | {r['ms']:.2f} | {_ratio(r)} |" for r in found[name]]
    return "\n".join(lines) + "\n"


def _ratio(row: Shown) -> str:
    middle, low, high = row["over_stock"]
    return f"{middle:.2f} ({low:.2f} - {high:.2f})"


def _draw(found: Shown, path: Path) -> None:
    """Milliseconds a step as bars, what the bytes allow as a mark in each."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("--out draws a picture: pip install 'plphp[eval]'") from None
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
    axes.set_xlabel("milliseconds a decode step, median and quartiles; red: what the bytes allow")
    figure.savefig(path, dpi=120)
    plt.close(figure)
