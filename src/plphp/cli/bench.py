"""`plphp bench`: what a step costs pruned and not, beside the bytes that it must move."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from plphp.cli import options as o
from plphp.cli.console import stderr, stdout
from plphp.errors import InputError

if TYPE_CHECKING:
    from plphp.bench.caches import Setting
    from plphp.bench.run import Options

NOTE = "Random weights: speed and memory only. The vision tower, the same for all, is left out."


def bench(
    shape: Annotated[str, typer.Option(help="Real sizes with random weights, or 'tiny'.")] = "tiny",
    layers: Annotated[
        int | None, typer.Option(help="Only so many layers, where the whole does not fit.")
    ] = None,
    context: Annotated[int, typer.Option(min=64, help="Columns of the prompt.")] = 2048,
    images: Annotated[int, typer.Option(min=1, help="Images that share them.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    keep: Annotated[
        str, typer.Option(help="Shares of the vision tokens kept, repeated over the layers.")
    ] = ".4",
    new_tokens: Annotated[int, typer.Option(min=2, help="Steps of a turn.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 5,
    prefill: Annotated[bool, typer.Option(help="Time the prompt too.")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format.")
    ] = "float32",
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on CUDA.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for result.json, result.md and a picture.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Decode with the stock cache, the pruned one and a short stock one in turn."""
    import torch

    from plphp.bench.caches import Setting
    from plphp.bench.run import Options, check_memory
    from plphp.bench.shapes import shape_of

    if gpu and not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no CUDA device here")
    device = "cuda" if gpu else "cpu"
    chosen = shape_of(shape, layers)
    setting = Setting(chosen, context, batch, images, getattr(torch, dtype), device)
    check_memory(setting)
    found = _measure(setting, Options(_rates(keep), rounds, new_tokens, prefill), as_json)
    if out is not None:
        from plphp.bench.present import write

        write(found, out)
        print(f"result.json, result.md and result.png in {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = stdout()
    for table in _tables(found):
        console.print(table)
    console.print(f"[dim]{NOTE}[/dim]")


def _measure(setting: Setting, options: Options, quiet: bool) -> dict[str, Any]:
    from plphp.bench import machine
    from plphp.bench.run import bench as run
    from plphp.bench.shapes import build

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), disable=quiet, transient=True) as progress:
        task = progress.add_task(f"decoding on {machine.describe(setting.device)['machine']}")
        model = build(setting.shape, setting.dtype, setting.device)
        progress.update(task, total=3 * options.rounds)
        return run(model, setting, options, lambda: progress.advance(task))


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--keep {text}: not shares, such as .4 or .7,.4,.1") from None
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"--keep {text}: shares are from 0 to 1")
    return rates


def _tables(found: dict[str, Any]) -> list[Table]:
    setting = found["setting"]
    title = (
        f"{setting['shape']['name']}, {setting['shape']['layers']} layers, {setting['dtype']}, "
        f"{setting['context']:,} columns x {setting['batch']}"
    )
    steps = Table(title=f"A decode step: {title}")
    for name in (
        "cache", "ms", "quartiles", "over stock", "(range)", "KV bytes", "bound ms", "of bound",
        "joules/token",
    ):  # fmt: skip
        steps.add_column(name, justify="left" if name == "cache" else "right")
    for row in found["steps"]:
        middle, low, high = row["over_stock"]
        steps.add_row(
            row["name"],
            f"{row['ms']:.2f}",
            " - ".join(f"{ms:.2f}" for ms in row["ms_quartiles"]),
            f"{middle:.2f}",
            f"{low:.2f} - {high:.2f}",
            f"{row['kv_bytes']:,}",
            f"{row['bound_ms']:.2f}",
            f"{row['of_bound']:.0%}",
            "absent" if row["joules_per_token"] is None else f"{row['joules_per_token']:.3f}",
        )
    steps.caption = f"bound: bytes over {found['copy_gb_s']} GB/s of copies; {found['energy']}"
    return [steps, *(_short(found, name) for name in ("attention", "prefill") if found[name])]


def _short(found: dict[str, Any], name: str) -> Table:
    titles = {"attention": "Cache and attention of all layers, a step", "prefill": "The prompt"}
    table = Table(title=titles[name])
    for column in ("cache", "ms", "over stock", "(range)"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in found[name]:
        middle, low, high = row["over_stock"]
        table.add_row(row["name"], f"{row['ms']:.2f}", f"{middle:.2f}", f"{low:.2f} - {high:.2f}")
    return table
