"""Ray Serve's LLM app with the plugin, in two replicas on CPUs: `serve_recipe.py [COUNT]`.

Requests about the same images carry the same session header, which Ray's consistent-hash router
reads. Answers are compared with those of a local engine, and each session with its replica. It
needs the environment of ray_recipe.py.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import urllib.request
from hashlib import sha256
from typing import Any

from ray_recipe import ENVIRONMENT, LARGEST, OPTIONS, SEED, png

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
PORT = 18123


def body(request: Any) -> dict[str, Any]:
    told = request.sampling
    parts: list[dict[str, Any]] = []
    for part in request.chat[0]["content"]:
        if part["type"] == "image_pil":
            data = base64.b64encode(png(part["image_pil"])).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        parts.append(part)
    return {
        "model": "embedded",
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": told.max_tokens,
        "min_tokens": told.min_tokens,
        "vllm_xargs": told.extra_args,
    }


def session(request: Any) -> str:
    """The same for the same images: the replica that has read them has their prefix."""
    return sha256(b"".join(png(image) for image in request.images)).hexdigest()


def ask(request: Any) -> str:
    sent = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        json.dumps(body(request)).encode(),
        {"content-type": "application/json", "x-session-id": session(request)},
    )
    answer: str = json.load(urllib.request.urlopen(sent, timeout=300))["choices"][0]["message"][
        "content"
    ]
    return answer


def main(count: int, replicas: int) -> None:
    os.environ.update(ENVIRONMENT)
    import ray
    import serving
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.llm import LLMConfig, build_openai_app

    import plphp
    from plphp.demo.model import WEIGHTS

    ray.init(num_cpus=8, object_store_memory=200_000_000, include_dashboard=False)
    serve.start(http_options={"port": PORT})
    config = LLMConfig(
        model_loading_config={"model_id": "embedded", "model_source": str(WEIGHTS)},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        deployment_config={
            "num_replicas": replicas,
            "request_router_config": RequestRouterConfig(request_router_class=ROUTER),
        },
        engine_kwargs={**OPTIONS, **plphp.vllm.engine_args(plphp.PLPHP())},
        log_engine_metrics=False,
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="plphp")
    requests = serving.random_requests(count, SEED, LARGEST)
    told = [ask(request) for request in requests]
    serve.shutdown()
    ray.shutdown()
    with serving.engine(**OPTIONS) as llm:
        outputs = serving.generate(llm, requests)
    differ = [k for k in range(count) if told[k] != outputs[k].outputs[0].text]
    print(f"{count} requests, {replicas} replicas, differ: {differ}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
