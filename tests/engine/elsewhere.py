"""Serves requests in a mode that needs a process of its own: `elsewhere.py MODE COUNT SEED OUT`."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

MODES: dict[str, dict[str, Any]] = {
    "multiprocess": {},
    "compiled": {"enforce_eager": False},
    "tensor parallel": {"tensor_parallel_size": 2},
    "bfloat16": {"dtype": "bfloat16"},
}
ENVIRONMENT = {
    "multiprocess": {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
    "tensor parallel": {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    },
}


def main(mode: str, count: str, seed: str, out: str) -> None:
    os.environ.update(ENVIRONMENT.get(mode, {}))
    import serving

    requests = serving.random_requests(int(count), int(seed))
    with serving.engine(max_num_batched_tokens=128, **MODES[mode]) as llm:
        outputs = serving.generate(llm, requests)
    answers = [
        {"tokens": list(o.outputs[0].token_ids), "told": o.kv_transfer_params} for o in outputs
    ]
    with open(out, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
