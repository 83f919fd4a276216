"""What the vLLM plugin costs and saves: `measure.py WHAT`, a name of MEASURES; JSON beside this.

Runs in the engine's environment (`make bench-vllm`). Weights are the embedded model's or, where
only shapes matter, random ones; the machine, versions and the date are part of every result.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import numpy as np
import torch
from PIL import Image
from record import record
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
    third = len(gammas) // 3
    beta, alpha = (sum(gammas[at - 1 : at + 1]) / 2 for at in (third, len(gammas) - third))
    return plphp.PLPHP(beta=beta, alpha=alpha)


def timed(owner: Any, name: str, spent: list[float]) -> None:
    """Add up what calls of a method take, one entry a call."""
    original = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, **kwargs)
        spent.append((time.perf_counter() - start) * 1e3)
        return result

    setattr(owner, name, wrapper)


@dataclass
class Steps:
    """What the steps of an engine were: one entry a step."""

    starts: list[float] = field(default_factory=list)
    decoding: list[int] = field(default_factory=list)  # requests that are decoded
    reading: list[bool] = field(default_factory=list)  # whether prompts are read beside them

    @staticmethod
    def of(scheduler: Any) -> Steps:
        steps, schedule = Steps(), scheduler.schedule

        def watched(*args: Any) -> Any:
            steps.starts.append(time.perf_counter())
            out = schedule(*args)
            steps.decoding.append(sum(r.num_output_tokens > 0 for r in scheduler.running))
            steps.reading.append(any(count > 1 for count in out.num_scheduled_tokens.values()))
            return out

        scheduler.schedule = watched
        return steps

    def summary(self) -> dict[str, float]:
        """Of a run that has ended now."""
        ends = [*self.starts[1:], time.perf_counter()]
        took = [end - start for start, end in zip(self.starts, ends, strict=True)]
        reading = sum(t for t, reads in zip(took, self.reading, strict=True) if reads)
        decoded = sum(n for n, reads in zip(self.decoding, self.reading, strict=True) if not reads)
        return {
            "most_at_once": max(self.decoding),
            "median_at_once": statistics.median(self.decoding),
            "steps": len(took),
            "seconds": round(sum(took), 2),
            "share_of_time_in_steps_that_read_prompts": round(reading / sum(took), 3),
            "decoded_a_second_in_other_steps": round(decoded / (sum(took) - reading), 1),
        }


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
    """Requests that are decoded at once, and tokens a second, in equal KV memory: one round."""
    found: dict[str, Any] = {}
    for megabytes, requests in ((96, 48), (24, 16)):
        for name, pruned in ways().items():
            with engine(pruned, kv_cache_memory_bytes=megabytes << 20, max_num_seqs=64) as llm:
                result = serve(llm, requests, tokens=192)
            found[f"{megabytes} MB, {name}"] = result
            print(megabytes, "MB", name, result, flush=True)
    return found


def serve(llm: LLM, requests: int, tokens: int) -> dict[str, Any]:
    """Requests that all arrive at once, each with images of its own."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    manager = scheduler.kv_cache_manager
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    chats = [chat(i) for i in range(requests)]
    llm.chat(chat(requests), SamplingParams(max_tokens=2), use_tqdm=False)  # warm
    steps = Steps.of(scheduler)
    outputs = llm.chat(chats, sampling, use_tqdm=False)
    result: dict[str, Any] = steps.summary()
    result["tokens_a_second"] = round(requests * tokens / result["seconds"], 1)
    length = len(outputs[0].prompt_token_ids)
    held = len(manager.coordinator.single_type_managers) * -(-(length + tokens - 1) // BLOCK)
    told = outputs[0].kv_transfer_params
    if told:
        held -= told["plphp"]["freed_blocks"]
        result["retention"] = round(told["plphp"]["retention"], 3)
    result["blocks_of_the_pool"] = manager.block_pool.num_gpu_blocks
    result["would_fit_if_none_was_reading"] = (manager.block_pool.num_gpu_blocks - 1) // held
    return result


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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record(name, MEASURES[name].__doc__, MEASURES[name](), rounds=name == "capacity")
