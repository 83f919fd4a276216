"""Short requests that are aborted and preempted at random: `make soak-vllm`, and a test.

This tests the release of blocks and state and not the answers, so two layers with random weights
and small prompts suffice.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import serving
from vllm import LLM

IDLE = 50  # steps without progress after which a run fails
PART = 500  # requests between two reports
LAYERS, BLOCKS = 2, 24  # blocks a layer: some three prompts of the sizes below
SMALL = {
    "hf_overrides": {
        "text_config": {"num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS},
        "vision_config": {"depth": 1},
    },
    "load_format": "dummy",
    "num_gpu_blocks_override": LAYERS * BLOCKS,
    "max_model_len": 512,
    "max_num_batched_tokens": 96,
}


def preempt(llm: LLM, drop: bool = False) -> list[bool]:
    """Preempt all running requests between two steps, as vLLM does when it is short of blocks.

    drop: whether the outcomes of steps that have not returned are dropped, as vLLM does where
        requests are resumed in the same step
    Returns, for each request, whether its prompt was still being computed.
    """
    scheduler = serving.scheduler_of(llm)
    running = list(scheduler.running)
    for request in reversed(running):
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic(), drop_stale_output=drop)
    scheduler.prev_step_scheduled_req_ids.clear()
    return [request.num_output_tokens == 0 for request in running]


class Soak:
    """One engine that serves random requests; `counts` counts their ends and preemptions."""

    def __init__(self, llm: LLM, seed: int) -> None:
        self.llm, self.engine, self.rng = llm, llm.llm_engine, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.alive: list[str] = []
        self.core = self.engine.engine_core.engine_core
        kinds = serving.random_requests(60, seed=60, most=8)
        self.kinds = [replace(kind, tokens=self.rng.randint(1, 6)) for kind in kinds]
        self.prompts = self.engine.renderer.render_cmpl(
            [serving.prompt(llm, kind) for kind in self.kinds]
        )
        self.idle, self.before = 0, []
        self.ahead = self.engine.vllm_config.scheduler_config.async_scheduling
        self._watch()

    def run(self, count: int) -> None:
        """Add requests until `count` have finished or been aborted."""
        added = 0
        while added < count or self.alive:
            while added < count and len(self.alive) < 12:
                self._add(str(added))
                added += 1
            self._step()
            if self.alive and self.rng.random() < 0.1:
                victim = self.alive.pop(self.rng.randrange(len(self.alive)))
                self.engine.abort_request([victim])
                self.counts["aborted"] += 1
            if self.rng.random() < 0.05:
                self._count_preempted(preempt(self.llm, drop=self.ahead))
        self.counts["requests"] += added
        for _ in range(3):  # workers hear of the last requests' end with the next step
            self.engine.step()

    def _add(self, name: str) -> None:
        kind = self.rng.randrange(len(self.kinds))
        sampling = self.kinds[kind].sampling
        if self.rng.random() < 0.02:
            sampling.extra_args = {"plphp.r": 7}
        self.engine.add_request(name, self.prompts[kind], sampling)
        self.alive.append(name)

    def _step(self) -> None:
        """One step. A request may be aborted after the forward, before its result is processed."""
        self.cut: str | None = None
        self._count_idle()
        for output in self.engine.step():
            if output.finished:
                self.alive.remove(output.request_id)
                self.counts["finished"] += 1
        if self.cut in self.alive:
            self.engine.abort_request([self.cut])
            self.alive.remove(self.cut)
            self.counts["aborted in mid-step"] += 1

    def _count_idle(self) -> None:
        """Raise RuntimeError if no request has gone on for `IDLE` steps while the pool is free."""
        scheduler = self.core.scheduler
        held = [*scheduler.running, *scheduler.waiting]
        now = [(r.request_id, r.num_tokens, r.num_computed_tokens) for r in held]
        self.idle = self.idle + 1 if now and now == self.before else 0
        self.before = now
        if self.idle >= IDLE:
            free = serving.free_blocks(self.llm)
            raise RuntimeError(f"{len(now)} requests wait for {IDLE} steps, {free} blocks are free")

    def _watch(self) -> None:
        execute, connector = self.core.model_executor.execute_model, self.core.scheduler.connector
        take, throw = connector.get_kv_connector_stats, self.core.scheduler._preempt_request

        def executed(*args: Any, **kwargs: Any) -> Any:
            result = execute(*args, **kwargs)
            running = self.core.scheduler.running
            if running and self.rng.random() < 0.1:
                victim = self.rng.choice(running).request_id
                self.cut = victim.rsplit("-", 1)[0]
                self.core.aborts_queue.put_nowait([victim])
            return result

        def taken() -> Any:
            stats = take()
            for name, number in stats.data.items() if stats else ():
                self.counts[f"plugin: {name}"] += number
            return stats

        def thrown(*args: Any, **kwargs: Any) -> None:
            self.counts["preempted"] += 1
            throw(*args, **kwargs)

        self.core.model_executor.execute_model = executed
        connector.get_kv_connector_stats = taken
        self.core.scheduler._preempt_request = thrown

    def _count_preempted(self, reading: list[bool]) -> None:
        self.counts["preempted by force"] += len(reading)
        self.counts["preempted by force in mid-prompt"] += sum(reading)


def soak(
    count: int,
    share: bool,
    seed: int = 5,
    tell: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Serve `count` requests; what was counted, and the blocks, entries and memory (MB) at the end.

    tell: is called with the same after every `PART` requests, so that a run may be stopped
    """
    start, found, memory = time.perf_counter(), {}, []
    with serving.engine(share_prefix=share, **SMALL) as llm:
        pool = serving.scheduler_of(llm).kv_cache_manager.block_pool
        before, run = serving.free_blocks(llm), Soak(llm, seed)
        while run.counts["requests"] < count:
            run.run(min(PART, count - run.counts["requests"]))
            memory.append(megabytes())
            found = dict(sorted(run.counts.items())) | {
                "blocks of the pool": pool.num_gpu_blocks,
                "blocks left in use": before - serving.free_blocks(llm),
                "entries left in the scheduler's and the worker's side": serving.state(llm),
                f"resident MB after every {PART} requests": list(memory),
                "seconds": round(time.perf_counter() - start),
                "seconds of CPU": round(time.process_time()),
            }
            tell(found)
    return found


def megabytes() -> int:
    return int(psutil.Process().memory_info().rss >> 20)
