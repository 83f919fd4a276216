"""What the vLLM plugin costs and saves: `measure.py scheduling|capacity|prefix`, JSON beside this.

Runs in the engine's environment (`make bench-vllm`). Weights are the embedded model's or, where
only shapes matter, random ones; the machine, versions and the date are part of every result.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import numpy as np
import torch
import vllm
from PIL import Image
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

import plphp
from plphp.demo.model import WEIGHTS, load
from plphp.vllm import engine_args

BLOCK, SIDE, IMAGES = 32, 24, 2  # two pictures of 24 x 24 vision tokens: 37 blocks, 98 % vision
PIXELS = {"max_pixels": (28 * SIDE) ** 2}


@contextlib.contextmanager
def engine(pruned: dict[str, Any] | None, **options: Any) -> Iterator[LLM]:
    """An engine, stock where `pruned` is None."""
    defaults: dict[str, Any] = {
        "model": str(WEIGHTS),
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 2048,
        "limit_mm_per_prompt": {"image": 6, "video": 0},
        "block_size": BLOCK,
        "seed": 0,
        "mm_processor_cache_gb": 0,
        "mm_processor_kwargs": PIXELS,
    }
    llm = LLM(**defaults | (engine_args(**pruned) if pruned is not None else {}) | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def picture(seed: int, side: int = SIDE) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((side * 28, side * 28), Image.Resampling.NEAREST)


def chat(
    seed: int, images: int = IMAGES, side: int = SIDE, text: str = "describe all pictures."
) -> Any:
    content = [
        {"type": "image_pil", "image_pil": picture(seed * images + i, side)} for i in range(images)
    ]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def policy() -> plphp.PLPHP:
    """Thresholds at thirds of the layers' vision attention on such a prompt: rates average .4."""
    embedded = load(torch.float32)
    embedded.image_processor.size = {"shortest_edge": 3136, "longest_edge": PIXELS["max_pixels"]}
    inputs = embedded.inputs([picture(i) for i in range(IMAGES)], "describe all pictures.")
    with plphp.prune(embedded.model) as pruning:
        embedded.model.generate(**inputs, max_new_tokens=1)
        gammas = sorted(layer.gamma[0] for layer in pruning.report.layers)
    return plphp.PLPHP(beta=sum(gammas[1:3]) / 2, alpha=sum(gammas[3:5]) / 2)


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Add up what calls of a method take, one entry a call."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spent.append((time.perf_counter() - start) * 1e3)
        return result

    setattr(owner, name, wrapper)


def watch_decoding(scheduler: Any) -> list[int]:
    """Grows by one entry a step: requests that are decoded in it."""
    decoding: list[int] = []
    schedule = scheduler.schedule

    def watched(*args: Any) -> Any:
        out = schedule(*args)
        decoding.append(sum(r.num_output_tokens > 0 for r in scheduler.running))
        return out

    scheduler.schedule = watched
    return decoding


def scheduling() -> dict[str, Any]:
    """Milliseconds that the scheduler spends on a decode step of 32 requests, 28 layers."""
    shape = {
        "hf_overrides": {
            "text_config": {"num_hidden_layers": 28, "layer_types": ["full_attention"] * 28}
        },
        "load_format": "dummy",
        "kv_cache_memory_bytes": 512 << 20,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 8192,
    }
    found: dict[str, Any] = {}
    kinds = {"stock": None} | {
        f"layers_per_group={n}": {"policy": plphp.PLPHP(), "layers_per_group": n}
        for n in (1, 4, 28)
    }
    for name, pruned in kinds.items():
        with engine(pruned, **shape) as llm:
            core = llm.llm_engine.engine_core.engine_core
            planned: list[float] = []
            settled: list[float] = []
            run: list[float] = []
            timed(core.scheduler, "schedule", planned)
            timed(core.scheduler, "update_from_output", settled)
            timed(core.model_executor, "execute_model", run)
            chats = [chat(i, images=1, side=8) for i in range(32)]
            sampling = SamplingParams(temperature=0, max_tokens=160, ignore_eos=True)
            llm.chat(chats, sampling, use_tqdm=False)
            decode = slice(-140, -10)  # all 32 decode: prompts are read, nobody has ended
            both = [a + b for a, b in zip(planned[decode], settled[decode], strict=True)]
            found[name] = {"scheduler_ms": spread(both), "model_ms": spread(run[decode])}
            print(name, found[name], flush=True)
    return found


def ways() -> dict[str, dict[str, Any] | None]:
    """What is compared: without the plugin, and with either rule of prefix caching."""
    chosen = policy()
    return {
        "stock": None,
        "pruned, shared prefix": {"policy": chosen},
        "pruned in place": {"policy": chosen, "share_prefix": False},
    }


def capacity() -> dict[str, Any]:
    """Requests that are decoded at once, and tokens a second, in equal KV memory."""
    found: dict[str, Any] = {}
    for name, pruned in ways().items():
        with engine(pruned, kv_cache_memory_bytes=96 << 20, max_num_seqs=64) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            decoding = watch_decoding(scheduler)
            sampling = SamplingParams(temperature=0, max_tokens=192, ignore_eos=True)
            chats = [chat(i) for i in range(48)]
            start = time.perf_counter()
            outputs = llm.chat(chats, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            found[name] = {
                "most_at_once": max(decoding),
                "median_at_once": statistics.median(decoding),
                "steps": len(decoding),
                "seconds": round(seconds, 2),
                "tokens_a_second": round(
                    sum(len(o.outputs[0].token_ids) for o in outputs) / seconds, 1
                ),
                "prompt_tokens": len(outputs[0].prompt_token_ids),
                "blocks_of_the_pool": scheduler.kv_cache_manager.block_pool.num_gpu_blocks,
            }
            told = outputs[0].kv_transfer_params
            if told:
                found[name]["retention"] = round(told["plphp"]["retention"], 3)
                found[name]["layer_classes"] = told["plphp"]["layer_classes"]
            print(name, found[name], flush=True)
    return found


def prefix() -> dict[str, Any]:
    """Seconds to the first token of a chat's first and second turn."""
    found: dict[str, Any] = {}
    sampling = SamplingParams(temperature=0, max_tokens=1)
    for name, pruned in ways().items():
        with engine(pruned, kv_cache_memory_bytes=256 << 20) as llm:
            llm.chat(chat(99), sampling, use_tqdm=False)
            first, second, cached = [], [], 0
            for seed in range(8):
                talk = chat(seed)
                start = time.perf_counter()
                answer = llm.chat(talk, sampling, use_tqdm=False)[0].outputs[0].text
                first.append((time.perf_counter() - start) * 1e3)
                turn = [
                    *talk,
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": "describe picture 2."},
                ]
                start = time.perf_counter()
                cached = llm.chat(turn, sampling, use_tqdm=False)[0].num_cached_tokens
                second.append((time.perf_counter() - start) * 1e3)
            found[name] = {
                "turn_1_ms": spread(first),
                "turn_2_ms": spread(second),
                "turn_2_cached_tokens": cached,
            }
            print(name, found[name], flush=True)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and the middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 3), "q1": round(low, 3), "q3": round(high, 3), "n": len(values)}


MEASURES: dict[str, Callable[[], dict[str, Any]]] = {
    "scheduling": scheduling,
    "capacity": capacity,
    "prefix": prefix,
}


def main(what: str) -> None:
    result = {
        "what": (MEASURES[what].__doc__ or "").strip(),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "plphp": plphp.__version__,
        },
        "results": MEASURES[what](),
    }
    path = Path(__file__).parent / f"{date.today().isoformat()}-{what}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1])
