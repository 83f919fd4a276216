"""A decode step with recall beside the untouched one, in turn: time, bytes, what was fetched.

    python dev/studies/recall_speed.py --context 32768 --dtype bfloat16 [--device cuda] [--json]

Random weights of a real size, random keys of rank 32 and random tokens, so that every step looks
elsewhere: the worst case for what has to be fetched.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import plphp
from plphp.bench import machine
from plphp.bench.caches import Setting
from plphp.bench.shapes import build, shape_of
from plphp.cache import allocated
from plphp.hf import compat
from plphp.hf.shared_prefill import adopt_view
from plphp.policy import LayerView
from plphp.recall import lanes

WARM = 2
RECALLS = {
    "host at 0.2": plphp.Recall("host", 0.2),
    "host at 0.4": plphp.Recall("host", 0.4),
    "int4 at 0.4": plphp.Recall("int4", 0.4),
    "int2 at 0.2": plphp.Recall("int2", 0.2),
}
# On a GPU also with one part, so that no copy runs beside the scoring.
ALONE = {"host at 0.2, one part": plphp.Recall("host", 0.2)}


def pair(setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """Keys (B, Hkv, N, D) near a subspace, as a model's are, and values."""
    shape = setting.shape
    torch.manual_seed(seed)
    size = (setting.batch, shape.kv_heads, setting.context)
    with torch.device(setting.device):
        basis = torch.randn(setting.batch, shape.kv_heads, 32, shape.head_dim, dtype=setting.dtype)
        keys = torch.randn(*size, 32, dtype=setting.dtype) @ basis / 6
        return keys, torch.randn(*size, shape.head_dim, dtype=setting.dtype)


def stock(model: Any, setting: Setting) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer in range(setting.shape.layers):
        cache.update(*pair(setting, layer), layer)
    return cache


def parked(model: Any, setting: Setting) -> Any:
    cache, spans = plphp.PrunedCache(model), setting.spans()
    for index, layer in cache.pruned_layers():
        keys, values = pair(setting, index)
        size = (setting.batch, setting.shape.heads, setting.context)
        probs = torch.rand(size, device=setting.device)
        view = LayerView(probs, spans, setting.shape.kv_heads, index, keys=keys, values=values)
        adopt_view(layer, view, None)
    cache.shared.spans = spans
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64, device=setting.device)
    return cache


def steps(model: Any, cache: Any, setting: Setting, count: int) -> list[float]:
    found = []
    for step in range(WARM + count):
        token = torch.randint(100, 8000, (setting.batch, 1), device=setting.device)
        place = torch.full_like(token, setting.context + step)
        machine.synchronize(setting.device)
        begin = time.perf_counter()
        model(input_ids=token, position_ids=place, use_cache=True, **{compat.CACHE: cache})
        machine.synchronize(setting.device)
        found.append(time.perf_counter() - begin)
    return found[WARM:]


def measured(model: Any, setting: Setting, rounds: int, count: int) -> list[dict[str, Any]]:
    """A row for stock transformers and for every kind of recall, after rounds in turn."""
    seconds: dict[str, list[float]] = {"stock": []}
    more: dict[str, dict[str, Any]] = {"stock": {}}
    recalls = {**RECALLS, **(ALONE if setting.device == "cuda" else {})}
    with torch.inference_mode():
        for _ in range(rounds):
            seconds["stock"].append(median(steps(model, stock(model, setting), setting, count)))
            for name, recall in recalls.items():
                lanes.SideStream.parts = 1 if name in ALONE else PARTS
                novelty = plphp.policy("novelty")
                with plphp.prune(model, novelty, recall=recall, vision_mask=setting.spans()):
                    cache = parked(model, setting)
                    seconds.setdefault(name, []).append(median(steps(model, cache, setting, count)))
                    more[name] = bytes_of(cache, count)
                del cache
    return [row(name, found, seconds["stock"], more[name]) for name, found in seconds.items()]


PARTS = lanes.SideStream.parts


def row(
    name: str, found: list[float], base: list[float], more: Mapping[str, Any]
) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(found, base, strict=True)]
    over = [round(value, 3) for value in (median(ratios), min(ratios), max(ratios))]
    return {"name": name, "ms": round(1e3 * median(found), 3), "over_stock": over, **more}


def bytes_of(cache: Any, count: int) -> dict[str, Any]:
    """The share of the vision bytes on the device, the parked bytes, those fetched for a token."""
    homes = [layer.parked for _, layer in cache.pruned_layers()]
    fetched = sum(sum(home.fetched[WARM:]) * home.token_bytes for home in homes) / count
    return {
        "device": round(sum(h.device for h in homes) / sum(h.full for h in homes), 3),
        "parked_bytes": allocated(x for home in homes for x in home.parked()),
        "fetched_bytes": round(fetched),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2-vl-2b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shape = shape_of(options.shape, options.layers)
    setting = Setting(shape, options.context, options.batch, 4, dtype, options.device)
    rows = measured(build(shape, dtype, options.device), setting, options.rounds, options.steps)
    if options.json:
        about, asked = machine.describe(options.device), vars(options)
        print(json.dumps({"about": about, "setting": asked, "steps": rows}))
        return
    for row in rows:
        print(
            f"{options.context} {options.dtype} {row['name']:22s} {row['ms']:8.1f} ms, over stock "
            "{:.2f} ({:.2f}-{:.2f})".format(*row["over_stock"]), _words(row), flush=True,
        )  # fmt: skip


def _words(row: Mapping[str, Any]) -> str:
    if "device" not in row:
        return ""
    return (
        f"device {row['device']:.3f} of the bytes, parked {row['parked_bytes'] / 2**20:.0f} MiB, "
        f"fetched {row['fetched_bytes'] / 2**20:.1f} MiB a token"
    )


if __name__ == "__main__":
    main()
