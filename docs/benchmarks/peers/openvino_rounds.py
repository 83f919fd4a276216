"""OpenVINO GenAI: as it is, with its cache eviction, and with a prompt as short as CDPruner's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from rounds import Moment, now, serve

KEPT = 0.4
BLOCK = 32  # tokens of a block of its cache on CPUs; sizes of the eviction are multiples of it


class Clock(genai.StreamerBase):  # type: ignore[misc]
    """Records when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[Moment] = []

    def write(self, token: Any) -> Any:
        self.times.append(now())
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


def scheduler(evict: int | None) -> Any:
    """evict: tokens to keep of each sequence, None for all."""
    how = genai.SchedulerConfig()
    how.enable_prefix_caching = False
    if evict is not None:
        how.use_cache_eviction = True
        mode = genai.AggregationMode.NORM_SUM
        how.cache_eviction_config = genai.CacheEvictionConfig(BLOCK, 4 * BLOCK, evict, mode)
    return how


def asked(pipe: Any, share: float = 1.0) -> Callable[[list[int], int], list[Moment]]:
    def ask(ids: list[int], new: int) -> list[Moment]:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        clock, some = Clock(), ids[: round(share * len(ids))]
        pipe.generate([ov.Tensor(np.array([some], dtype=np.int64))], [config], clock)
        return clock.times

    return ask


def main(folder: str, way: str, columns: str, threads: str) -> None:
    kept = round(KEPT * int(columns)) // BLOCK * BLOCK
    evict = kept if way == "eviction" else None
    cores = {"INFERENCE_NUM_THREADS": int(threads)}
    path = f"{folder}/openvino"
    pipe = genai.ContinuousBatchingPipeline(path, scheduler(evict), "CPU", cores)
    serve({way: asked(pipe, KEPT if way == "short" else 1.0)})


if __name__ == "__main__":
    main(*sys.argv[1:])
