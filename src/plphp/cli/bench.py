"""`plphp bench`: what a step costs pruned and not, beside the bytes that it must move."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
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
    from plphp.bench.shapes import Shape

NOTE = "Random weights: speed and memory only. The vision tower, the same for all, is left out."


def bench(
    shape: Annotated[str, typer.Option(help="Real sizes with random weights, or 'tiny'.")] = "tiny",
    model: Annotated[
        str | None, typer.Option(help="Instead: 'embedded', a local directory, or a hub id.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Only so many layers, where the whole does not fit.")
    ] = None,
    context: Annotated[int, typer.Option(min=64, help="Columns of the prompt.")] = 2048,
    images: Annotated[int, typer.Option(min=1, help="Images that share them.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    keep: Annotated[
        str, typer.Option(help="Shares of the vision tokens kept, repeated over the layers.")
    ] = ".4",
    against: Annotated[
        str,
        typer.Option(help="Beside stock and pruned: short, static, pruned-static, int4, fp8, or "
                     "methods such as snapkv; commas between."),
    ] = "short",
    new_tokens: Annotated[int, typer.Option(min=2, help="Steps of a turn.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way.")] = 5,
    prefill: Annotated[bool, typer.Option(help="Time the prompt too.")] = False,
    memory: Annotated[
        str, typer.Option(help="GiB for the table of what fits.")
    ] = "16,24,48,80,141",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format.")
    ] = "float32",
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on CUDA.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Directory for result.json, result.md and a picture.")
    ] = None,
    as_json: o.Json = False,
) -> None:  # fmt: skip
    """Decode with the stock cache, the pruned one and others in turn."""
    import torch

    from plphp.bench.caches import Setting
    from plphp.bench.run import Options
    from plphp.bench.variants import check_names

    if gpu and not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no CUDA device here")
    memories = tuple(int(gib * 2**30) for gib in _numbers(memory, "--memory", "24,80"))
    names = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    check_names(names)
    options = Options(_rates(keep), rounds, new_tokens, prefill, names, memories)
    kind, device = getattr(torch, dtype), "cuda" if gpu else "cpu"
    loaded, chosen = _chosen(shape, layers, model, dtype, device)
    setting = Setting(chosen, context, batch, images, kind, device)
    found = _measure(loaded, setting, options, as_json)
    _show(found, out, as_json)
    if model is None and not as_json:
        stdout().print(f"[dim]{NOTE}[/dim]")


def _show(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Files where they are asked for, and tables or JSON on standard output."""
    if out is not None:
        from plphp.bench.present import write

        write(found, out)
        print(f"result.json, result.md and result.png in {out}", file=sys.stderr)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for table in _tables(found):
        stdout().print(table)


def _chosen(
    shape: str, layers: int | None, model: str | None, dtype: str, device: str
) -> tuple[Any, Shape]:
    """A loaded model with its shape, or none yet and the shape to build."""
    from plphp.bench.shapes import shape_of, shape_of_model

    if model is None:
        return None, shape_of(shape, layers)
    if layers is not None:
        raise InputError("--layers cuts a --shape; a --model is measured whole")
    from plphp.inputs import load

    loaded = load(model, dtype, device).model
    return loaded, shape_of_model(model, loaded)


def _measure(loaded: Any, setting: Setting, options: Options, quiet: bool) -> dict[str, Any]:
    from plphp.bench import machine
    from plphp.bench.run import bench as run
    from plphp.bench.run import check_memory
    from plphp.bench.shapes import build

    check_memory(setting)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=stderr(), disable=quiet, transient=True) as progress:
        task = progress.add_task(f"decoding on {machine.describe(setting.device)['machine']}")
        model = loaded or build(setting.shape, setting.dtype, setting.device)
        progress.update(task, total=(2 + len(options.against)) * options.rounds)
        return run(model, setting, options, lambda: progress.advance(task))


def _numbers(text: str, option: str, example: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: not numbers, such as {example}") from None


def _rates(text: str) -> tuple[float, ...]:
    rates = _numbers(text, "--keep", ".4 or .7,.4,.1")
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"--keep {text}: shares are from 0 to 1")
    return rates


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    """The same rows as in the Markdown of `--out`."""
    from plphp.bench.present import sections, title

    for name, (header, rows) in sections(found).items():
        table = Table(title=f"{name}: {title(found)}" if name == "A decode step" else name)
        for column in header:
            table.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            table.add_row(*row)
        if name == "A decode step":
            table.caption = (
                f"bound: bytes over {found['copy_gb_s']} GB/s; energy: {found['energy']}"
            )
        yield table
