"""A decode step with recall beside the untouched one, in turn: time, bytes, what was fetched.

    python dev/studies/recall_speed.py --context 32768 --dtype bfloat16

Random weights of a real size, random keys of rank 32 and random tokens, so that every step looks
elsewhere: the worst case for what has to be fetched.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import plphp
from plphp.bench.caches import Setting
from plphp.bench.shapes import build, shape_of
from plphp.cache import allocated
from plphp.hf.shared_prefill import adopt_view
from plphp.policy import LayerView

STEPS, WARM = 8, 2
RECALLS = (
    plphp.Recall("host", 0.2),
    plphp.Recall("host", 0.4),
    plphp.Recall("int4", 0.4),
    plphp.Recall("int2", 0.2),
)


def pair(setting: Setting, seed: int) -> tuple[Tensor, Tensor]:
    """Keys (B, Hkv, N, D) near a subspace, as a model's are, and values."""
    shape = setting.shape
    drawn = torch.Generator().manual_seed(seed)
    size = (setting.batch, shape.kv_heads, setting.context)
    basis = torch.randn(setting.batch, shape.kv_heads, 32, shape.head_dim, generator=drawn)
    keys = torch.randn(*size, 32, generator=drawn) @ basis / 6
    values = torch.randn(*size, shape.head_dim, generator=drawn)
    return keys.to(setting.dtype), values.to(setting.dtype)


def stock(model: Any, setting: Setting) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer in range(setting.shape.layers):
        cache.update(*pair(setting, layer), layer)
    return cache


def parked(model: Any, setting: Setting) -> Any:
    cache, spans = plphp.PrunedCache(model), setting.spans()
    for index, layer in cache.pruned_layers():
        keys, values = pair(setting, index)
        probs = torch.rand(setting.batch, setting.shape.heads, setting.context)
        view = LayerView(probs, spans, setting.shape.kv_heads, index, keys=keys, values=values)
        adopt_view(layer, view, None)
    cache.shared.spans = spans
    cache.shift = torch.zeros(setting.batch, dtype=torch.int64)
    return cache


def steps(model: Any, cache: Any, setting: Setting) -> list[float]:
    found = []
    for step in range(WARM + STEPS):
        token = torch.randint(100, 10000, (setting.batch, 1))
        place = torch.full_like(token, setting.context + step)
        begin = time.perf_counter()
        model(input_ids=token, position_ids=place, past_key_values=cache, use_cache=True)
        found.append(time.perf_counter() - begin)
    return found[WARM:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen2-vl-2b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shape = shape_of(options.shape, options.layers)
    setting = Setting(shape, options.context, 1, 4, dtype, "cpu")
    model = build(shape, dtype, "cpu")
    seconds: dict[str, list[float]] = {"stock": []}
    said: dict[str, str] = {"stock": ""}
    with torch.inference_mode():
        for _ in range(options.rounds):
            seconds["stock"].append(median(steps(model, stock(model, setting), setting)))
            for recall in RECALLS:
                name = f"{recall.home} at {recall.budget}"
                novelty = plphp.policy("novelty")
                with plphp.prune(model, novelty, recall=recall, vision_mask=setting.spans()):
                    cache = parked(model, setting)
                    seconds.setdefault(name, []).append(median(steps(model, cache, setting)))
                    said[name] = _words(cache)
                del cache
    for name, found in seconds.items():
        ratios = [own / base for own, base in zip(found, seconds["stock"], strict=True)]
        print(
            f"{options.context} {options.dtype} {name:12s} {1e3 * median(found):8.1f} ms, over "
            f"stock {median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}) {said[name]}",
            flush=True,
        )


def _words(cache: Any) -> str:
    homes = [layer.parked for _, layer in cache.pruned_layers()]
    fetched = sum(sum(home.fetched[WARM:]) * home.token_bytes for home in homes) / STEPS
    held = allocated(x for home in homes for x in home.parked())
    device = sum(home.device for home in homes) / sum(home.full for home in homes)
    return (
        f"device {device:.3f} of the bytes, parked {held / 2**20:.0f} MiB, fetched "
        f"{fetched / 2**20:.1f} MiB a token"
    )


if __name__ == "__main__":
    main()
