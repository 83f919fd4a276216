"""llama.cpp's rounds, through the bindings of xllamacpp: keys and values in 16 and in 8 bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import xllamacpp as xl
from rounds import Moment, now, serve

ROOM = 64  # tokens of the answer


def server(path: str, columns: int, threads: int, kind: Any) -> Any:
    how = xl.CommonParams()
    how.model.path = path
    how.n_ctx, how.n_parallel, how.warmup, how.cache_prompt = columns + ROOM, 1, True, False
    how.cache_ram_mib = 0
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = threads
    how.cache_type_k = how.cache_type_v = kind
    how.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    return xl.Server(how)


def asked(made: Any) -> Callable[[list[int], int], list[Moment]]:
    def ask(ids: list[int], new: int) -> list[Moment]:
        times: list[Moment] = []

        def came(chunk: Any) -> None:
            parts = chunk if isinstance(chunk, list) else [chunk]
            times.extend([now()] * len(parts))

        job = {"prompt": ids, "n_predict": new, "temperature": 0, "ignore_eos": True}
        made.handle_completions({**job, "stream": True, "cache_prompt": False}, came)
        return times

    return ask


def main(folder: str, way: str, columns: str, threads: str) -> None:
    kinds = xl.ggml_type
    kind = kinds.GGML_TYPE_F16 if way == "16 bits" else kinds.GGML_TYPE_Q8_0
    serve({way: asked(server(f"{folder}/model.gguf", int(columns), int(threads), kind))})


if __name__ == "__main__":
    main(*sys.argv[1:])
