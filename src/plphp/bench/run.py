"""One benchmark: the decoding steps and the prefill of several variants of the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from plphp.bench import machine
from plphp.bench.caches import Setting
from plphp.bench.capacity import fits
from plphp.bench.layer import attention_seconds, pruning_seconds
from plphp.bench.shapes import needed_bytes
from plphp.bench.steps import WARM, Measured, bound_seconds, race
from plphp.bench.variants import DEFAULT, Variant, variants
from plphp.errors import InputError

ATTENTION_STEPS = 20
MEMORIES = tuple(gib << 30 for gib in (16, 24, 48, 80, 141))


@dataclass(frozen=True)
class Options:
    """What a benchmark measures.

    rates: share of vision tokens that each layer keeps; a shorter tuple is repeated over the layers
    rounds: how often each variant is measured
    steps: new tokens in a round
    prefill: whether the prefill is timed as well, which takes long on a CPU
    against: names of further variants, see `variants`
    memories: memory sizes in bytes, for the table of what fits
    """

    rates: tuple[float, ...]
    rounds: int
    steps: int
    prefill: bool
    against: tuple[str, ...] = DEFAULT
    memories: tuple[int, ...] = MEMORIES


def check_memory(setting: Setting) -> None:
    """Raise InputError, before anything is allocated, if the run does not fit into memory."""
    size = setting.dtype.itemsize
    need = needed_bytes(setting.shape, setting.context, setting.batch, size)
    free = machine.free_bytes(setting.device)
    if free is not None and need > free:
        raise InputError(
            f"this run needs about {need / 2**30:.1f} GiB and {free / 2**30:.1f} are free: take "
            "fewer --layers, a shorter --context, a smaller --batch, or another --dtype"
        )


def bench(
    model: Any, setting: Setting, options: Options, advance: Callable[[], None]
) -> dict[str, Any]:
    """All results of one run as plain values for JSON; times in milliseconds.

    advance: called after each round of each variant
    """
    answer_columns = options.steps + WARM
    chosen = variants(model, setting, options.rates, answer_columns, options.against)
    moved = machine.bandwidth(setting.device)
    found = race(model, setting, chosen, options.steps, options.rounds, advance)
    moved = max(moved, machine.bandwidth(setting.device))  # the bound uses the faster measurement
    stock = found[0]
    read = [one for one in chosen if one.name == "stock" or (one.policy and not one.compiled)]
    prefill = _prefill(model, setting, read, options.rounds) if options.prefill else None
    return {
        "about": machine.describe(setting.device),
        "setting": _plain(setting, options),
        "copy_gb_s": round(moved / 1e9, 2),
        "energy": machine.energy_meter(setting.device)[1],
        "steps": [_row(variant, stock, setting, moved) for variant in found],
        "attention": _attention(setting, options),
        "prefill": prefill,
        "pruning_ms": _pruning(setting, options),
        "fits": _fits(setting, options),
    }


def _plain(setting: Setting, options: Options) -> dict[str, Any]:
    shape = asdict(setting.shape)
    for name in ("config", "head", "weights"):
        shape.pop(name)
    return {
        "shape": shape,
        "context": setting.context,
        "images": setting.images,
        "batch": setting.batch,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "weight_bytes": setting.weights,
        "device": setting.device,
        "keep": list(options.rates),
        "new_tokens": options.steps,
        "rounds": options.rounds,
    }


def _row(variant: Measured, stock: Measured, setting: Setting, moved: float) -> dict[str, Any]:
    low, high = variant.spread()
    bound = bound_seconds(setting, variant.kv_bytes, moved)
    ratio, least, most = variant.ratio(stock)
    return {
        "name": variant.name,
        "ms": _ms(variant.seconds),
        "ms_quartiles": [_ms(low), _ms(high)],
        "rounds_ms": [_ms(median(steps)) for steps in variant.steps],
        "tokens_per_second": round(setting.batch / variant.seconds, 3),
        "over_stock": [round(ratio, 3), round(least, 3), round(most, 3)],
        "kv_bytes": variant.kv_bytes,
        "resident_bytes": variant.resident,
        "bound_ms": _ms(bound),
        "of_bound": round(bound / variant.seconds, 3),
        "joules_per_token": round(median(variant.joules), 4) if variant.joules else None,
        "cpu_seconds_per_token": round(median(variant.cpu), 6),
    }


def _attention(setting: Setting, options: Options) -> list[dict[str, Any]]:
    """The cache and attention of a layer at the mean rate, times the number of layers."""
    rate = sum(options.rates) / len(options.rates)
    found = attention_seconds(setting, rate, ATTENTION_STEPS, options.rounds)
    return _against_stock(found, setting.shape.layers)


def _pruning(setting: Setting, options: Options) -> dict[str, float]:
    """The time that pruning adds to a prefill in all layers: median, lowest and highest."""
    rate = sum(options.rates) / len(options.rates)
    found = pruning_seconds(setting, rate, options.rounds)
    layers = setting.shape.layers
    found = [_ms(seconds * layers) for seconds in found]
    return {"median": median(found), "least": min(found), "most": max(found)}


def _prefill(
    model: Any, setting: Setting, chosen: list[Variant], rounds: int
) -> list[dict[str, Any]]:
    """Prefills of the variants in turn. The first round is a warm-up and is not counted."""
    ids = torch.ones(setting.batch, setting.context, dtype=torch.int64, device=setting.device)
    seconds: dict[str, list[float]] = {variant.name: [] for variant in chosen}
    peaks: dict[str, int | None] = {}
    for turn in range(rounds + 1):
        for variant in chosen:
            machine.forget_peak(setting.device)
            held = machine.resident_bytes(setting.device) or 0
            with variant.attach(), torch.inference_mode():
                spent = _timed(model, ids, setting.device)
            peak = machine.peak_bytes(setting.device)
            peaks[variant.name] = None if peak is None else max(peak - held, 0)
            if turn:
                seconds[variant.name].append(spent)
    rows = _against_stock(seconds)
    return [{**row, "peak_bytes": peaks[row["name"]]} for row in rows]


def _fits(setting: Setting, options: Options) -> list[dict[str, Any]]:
    rate = setting.kept(sum(options.rates) / len(options.rates)) / setting.context
    size = setting.dtype.itemsize
    return [
        fits(setting.shape, memory, rate, size, setting.context, setting.batch, setting.weights)
        for memory in options.memories
    ]


def _against_stock(found: dict[str, list[float]], times: int = 1) -> list[dict[str, Any]]:
    """Times `times` the seconds of each round, and their ratios to those of "stock"."""
    rows = []
    for name, seconds in found.items():
        ratios = [mine / theirs for mine, theirs in zip(seconds, found["stock"], strict=True)]
        rows.append(
            {
                "name": name,
                "ms": _ms(median(seconds) * times),
                "over_stock": [round(f(ratios), 3) for f in (median, min, max)],
            }
        )
    return rows


def _timed(model: Any, ids: torch.Tensor, device: str) -> float:
    machine.synchronize(device)
    start = time.perf_counter()
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    machine.synchronize(device)
    return time.perf_counter() - start


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)
