"""`plphp bench`: what a step costs pruned and not, beside the bytes that it must move."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from plphp.cli import options as o
from plphp.cli.console import progress, say, shown, stdout
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
    context: Annotated[int, typer.Option(min=64, max=o.MOST, help="Columns of the prompt.")] = 2048,
    images: Annotated[int, typer.Option(min=1, max=o.MOST, help="Images that share them.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=o.MOST, help="Rows.")] = 1,
    keep: Annotated[
        str, typer.Option(help="Shares of the vision tokens kept, repeated over the layers.")
    ] = ".4",
    against: Annotated[
        str,
        typer.Option(help="Beside stock and pruned: short, static, pruned-static, int4, fp8, or "
                     "methods such as snapkv; commas between."),
    ] = "short",
    new_tokens: Annotated[int, typer.Option(min=2, max=o.MOST, help="Steps of a turn.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, max=o.MOST, help="Turns of each way.")] = 5,
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

    _check_asked(context, images, out)
    memories = tuple(int(gib * 2**30) for gib in _numbers(memory, "--memory", "24,80"))
    names = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    check_names(names)
    options = Options(_rates(keep), rounds, new_tokens, prefill, names, memories)
    kind, device = getattr(torch, dtype), _device(gpu)
    loaded, chosen = _chosen(shape, layers, model, dtype, device)
    _check_shares(keep, options.rates, chosen.layers)
    setting = Setting(chosen, context, batch, images, kind, device)
    found = _measure(loaded, setting, options, as_json)
    _show(found, out, as_json)
    if model is None and not as_json:
        stdout().print(NOTE, style="dim")


def _device(gpu: bool) -> str:
    import torch

    if gpu and not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no CUDA device here")
    return "cuda" if gpu else "cpu"


def _check_asked(context: int, images: int, out: Path | None) -> None:
    """Raise InputError for more images than columns, and for an `out` that cannot be used."""
    from plphp.bench.caches import TEXT

    if images > context - TEXT:
        raise InputError(
            f"--images {images} share --context {context} with {TEXT} columns of text: at most "
            f"{context - TEXT} images, one column each, fit"
        )
    _check_out(out)


def _check_shares(keep: str, rates: tuple[float, ...], layers: int) -> None:
    """Raise InputError for shares that no layer would take."""
    if len(rates) > layers:
        raise InputError(
            f"--keep {keep}: {len(rates)} shares for {layers} layers; give as many or fewer"
        )


def _check_out(out: Path | None) -> None:
    """Raise InputError for a directory whose files would be lost."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file, and the results need a directory")
    for name in ("result.json", "result.md", "result.png"):
        if (out / name).exists() and not _is_result(out / "result.json"):
            raise InputError(f"--out {out}: its {name} is no result of plphp: give another --out")


def _is_result(path: Path) -> bool:
    from plphp.inputs import lines

    try:
        return {"setting", "steps"} <= dict(lines.load(path.read_bytes())).keys()
    except (OSError, ValueError, TypeError):
        return False


def _show(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Files where they are asked for, and tables or JSON on standard output."""
    if out is not None:
        from plphp.bench.present import write

        write(found, out)
        say(f"result.json, result.md and result.png in {out}")
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
    from plphp.inputs import load

    loaded = load(model, dtype, device).model
    return loaded, shape_of_model(model, loaded)


def _measure(loaded: Any, setting: Setting, options: Options, quiet: bool) -> dict[str, Any]:
    from plphp.bench import machine
    from plphp.bench.run import bench as run
    from plphp.bench.run import check_memory
    from plphp.bench.shapes import build

    check_memory(setting)
    with progress(quiet, transient=True) as bar:
        task = bar.add_task(f"decoding on {machine.describe(setting.device)['machine']}")
        model = loaded or build(setting.shape, setting.dtype, setting.device)
        bar.update(task, total=(2 + len(options.against)) * options.rounds)
        return run(model, setting, options, lambda: bar.advance(task))


def _numbers(text: str, option: str, example: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option} {text}: not numbers, such as {example}") from None
    if not all(0 <= number < math.inf for number in numbers):
        raise InputError(f"{option} {text}: numbers must be 0 or more, such as {example}")
    return numbers


def _rates(text: str) -> tuple[float, ...]:
    rates = _numbers(text, "--keep", ".4 or .7,.4,.1")
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"--keep {text}: shares are from 0 to 1")
    return rates


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    """The same rows as in the Markdown of `--out`."""
    from plphp.bench.present import sections, title

    for name, (header, rows) in sections(found).items():
        table = Table(title=shown(f"{name}: {title(found)}") if name == "A decode step" else name)
        for column in header:
            table.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            table.add_row(*map(shown, row))
        if name == "A decode step":
            table.caption = (
                f"bound: bytes over {found['copy_gb_s']} GB/s; energy: {found['energy']}"
            )
        yield table
