"""`plphp bench`: the time of a decoding step with the pruned cache and with other caches."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from plphp._words import counted
from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.bits import Weights, warn_of_prompts
from plphp.cli.console import loading, progress, say, shown, stdout, warn
from plphp.errors import InputError
from plphp.policy.checks import meant_share

if TYPE_CHECKING:
    from plphp.bench.caches import Setting
    from plphp.bench.run import Options
    from plphp.bench.shapes import Shape

NOTE = (
    "The weights are random, so this measures speed and memory only. The vision tower is left out, "
    "because its work does not depend on the cache."
)


def bench(
    shape: flags.ShapeName = "tiny",
    model: flags.OwnModel = None,
    layers: flags.Layers = None,
    context: flags.Context = 2048,
    images: flags.Images = 1,
    batch: flags.Rows = 1,
    keep: flags.Keep = ".4",
    against: flags.Against = "short",
    new_tokens: flags.NewTokens = 16,
    rounds: flags.BenchRounds = 5,
    prefill: flags.Prefill = False,
    first_token: flags.FirstToken = None,
    memory: flags.Memory = "16,24,48,80,141",
    dtype: flags.FloatDtype = "float32",
    weights: Weights = None,
    gpu: flags.Gpu = False,
    out: flags.ResultsOut = None,
    as_json: o.Json = False,
) -> None:
    """Time decoding with transformers' own cache, the pruned cache, and other caches in turn."""
    import torch

    from plphp.bench.caches import Setting
    from plphp.bench.run import Options
    from plphp.bench.variants import check_names

    _check_asked(context, images, out)
    memories = tuple(int(gib * 2**30) for gib in _numbers(memory, "--memory", "24,80"))
    names = tuple(dict.fromkeys(name.strip() for name in against.split(",") if name.strip()))
    check_names(names)
    if first_token is not None:
        if model is not None or out is not None:
            raise InputError("--first-token builds its own model: leave out --model and --out")
        return _first_token(first_token, shape, layers, context, images, batch, rounds, dtype, gpu,
                            as_json)  # fmt: skip
    options = Options(_rates(keep), rounds, new_tokens, prefill, names, memories)
    kind, device = getattr(torch, dtype), _device(gpu)
    loaded, chosen = _chosen(shape, layers, model, dtype, device)
    _check_shares(keep, options.rates, chosen.layers)
    setting = Setting(chosen, context, batch, images, kind, device)
    found = _measure(loaded, setting, options, weights, as_json)
    _show(found, out, as_json)
    if model is None and not as_json:
        stdout().print(NOTE, style="dim")


def _first_token(
    methods: str, shape: str, layers: int | None, context: int, images: int, batch: int,
    rounds: int, dtype: str, gpu: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time the first token with these methods, and print a table or JSON."""
    import torch

    from plphp.bench import first_token as measure
    from plphp.bench import machine, present
    from plphp.bench.caches import Setting
    from plphp.bench.run import check_memory
    from plphp.bench.shapes import shape_of

    policies, device = measure.named_policies(methods), _device(gpu)
    setting = Setting(
        shape_of(shape, layers), context, batch, images, getattr(torch, dtype), device
    )
    check_memory(setting)
    with progress(as_json, transient=True) as bar:
        about = machine.describe(device)
        task = bar.add_task(f"first tokens on {about['machine']}")
        model = measure.build(setting.shape, setting.dtype, device)
        bar.update(task, total=(1 + len(policies)) * (1 + rounds))
        rows = measure.first_token(model, setting, policies, rounds, lambda: bar.advance(task))
    if as_json:
        print(json.dumps({"about": about, "rounds": rounds, "first_token": rows}, indent=1))
        return
    depth = counted(setting.shape.layers, "layer")
    table = Table(title=f"The first token: {shape}, {depth}, {dtype}, {context:,} columns")
    table.add_column("method", overflow="fold")
    for column in (
        "K/V kept",
        "ms",
        "tower ms",
        "tower",
        "ratio to stock",
        "decoder, ratio to stock",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        ratios = (row["over_stock"], row["decoder_over_stock"])
        shares = [f"{mid:.2f} ({low:.2f} - {high:.2f})" for mid, low, high in ratios]
        cells = [row["name"], f"{row['kept']:.0%}", f"{row['ms']:.0f}", f"{row['tower_ms']:.0f}"]
        table.add_row(*map(shown, [*cells, f"{row['tower_share']:.0%}", *shares]))
    table.caption, table.caption_justify = present.RATIO, "left"
    stdout().print(table)


def _device(gpu: bool) -> str:
    import torch

    if gpu and not torch.cuda.is_available():
        raise InputError("--gpu: PyTorch sees no CUDA device here")
    return "cuda" if gpu else "cpu"


def _check_asked(context: int, images: int, out: Path | None) -> None:
    """Raise InputError if there are more images than columns, or if `out` cannot be used."""
    from plphp.bench.caches import TEXT

    if images > context - TEXT:
        raise InputError(
            f"--images {images} do not fit in --context {context}, of which {TEXT} columns are "
            f"text: give at most {context - TEXT} images, one column each"
        )
    _check_out(out)


def _check_shares(keep: str, rates: tuple[float, ...], layers: int) -> None:
    """Raise InputError if there are more shares than layers."""
    if len(rates) > layers:
        raise InputError(
            f"--keep {keep}: these are {len(rates)} shares for {counted(layers, 'layer')}; give at "
            "most one share per layer"
        )


def _check_out(out: Path | None) -> None:
    """Raise InputError for a file, and for a directory whose own files would be overwritten."""
    if out is None:
        return
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file: give a directory for the results")
    for name in ("result.json", "result.md", "result.png"):
        if (out / name).exists() and not _is_result(out / "result.json"):
            raise InputError(
                f"--out {out}: its {name} is not a result of plphp bench: give another --out"
            )


def _is_result(path: Path) -> bool:
    from plphp.inputs import lines

    try:
        return {"setting", "steps"} <= dict(lines.load(path.read_bytes())).keys()
    except (OSError, ValueError, TypeError):
        return False


def _show(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """Write the files of --out, and print tables or JSON on standard output."""
    if out is not None:
        from plphp.bench.present import write

        write(found, out)
        say(f"result.json, result.md and result.png are in {out}")
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for table in _tables(found):
        stdout().print(table)


def _chosen(
    shape: str, layers: int | None, model: str | None, dtype: str, device: str
) -> tuple[Any, Shape]:
    """The loaded model of --model and its shape, or None and the shape of --shape to build."""
    from plphp.bench.shapes import shape_of, shape_of_model

    if model is None:
        return None, shape_of(shape, layers)
    from plphp.inputs import load

    with loading(model):
        loaded = load(model, dtype, device, tell=warn).model
    return loaded, shape_of_model(model, loaded)


def _measure(
    loaded: Any, setting: Setting, options: Options, weights: str | None, quiet: bool
) -> dict[str, Any]:
    from plphp.bench import machine
    from plphp.bench.run import bench as run
    from plphp.bench.run import check_memory
    from plphp.bench.shapes import build
    from plphp.inputs.rounding import bits_of
    from plphp.weights import round_weights, step_bytes, weight_bytes

    bits = bits_of(weights, setting.device, str(setting.dtype).removeprefix("torch."))
    warn_of_prompts(weights)
    check_memory(setting)
    with progress(quiet, transient=True) as bar:
        task = bar.add_task(f"decoding on {machine.describe(setting.device)['machine']}")
        model = loaded or build(setting.shape, setting.dtype, setting.device)
        if bits:
            round_weights(model, bits)
            setting = replace(setting, rounded=(step_bytes(model), weight_bytes(model)))
        bar.update(task, total=(2 + len(options.against)) * options.rounds)
        found = run(model, setting, options, lambda: bar.advance(task))
    found["setting"]["weights"] = weights
    return found


def _numbers(text: str, option: str, example: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{option} {text}: give numbers with commas between them, such as {example}"
        ) from None
    if not all(0 <= number < math.inf for number in numbers):
        raise InputError(f"{option} {text}: the numbers must be 0 or more, such as {example}")
    return numbers


def _rates(text: str) -> tuple[float, ...]:
    rates = _numbers(text, "--keep", ".4 or .7,.4,.1")
    if not all(0 <= rate <= 1 for rate in rates):
        raise InputError(f"--keep {text}: the shares must be from 0 to 1{meant_share(max(rates))}")
    return rates


def _tables(found: dict[str, Any]) -> Iterator[Table]:
    """The tables to print, with the rows of the Markdown file in `--out`."""
    from plphp.bench.present import STEP, legends, sections, title

    said = legends(found)
    for name, (header, rows) in sections(found).items():
        table = Table(title=shown(f"{name}: {title(found)}") if name == STEP else name)
        for column in header:
            table.add_column(column, justify="left" if column == header[0] else "right")
        for row in rows:
            table.add_row(*map(shown, row))
        table.caption, table.caption_justify = "\n".join(said.get(name, [])) or None, "left"
        yield table
