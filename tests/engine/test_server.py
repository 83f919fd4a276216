"""The OpenAI server: many streamed requests with images at once, some of them cancelled."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import answers
import openai
import psutil
import pytest
import serving
import vllm

import plphp
from plphp.demo.model import WEIGHTS

PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
SMALL = (
    *("--enforce-eager", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "16"),
    *("--block-size", "32"),
    *("--limit-mm-per-prompt", '{"image": 6, "video": 0}', "--mm-processor-cache-gb", "0"),
)


@dataclass(frozen=True)
class Server:
    url: str
    pid: int
    log: Path


def page_command() -> list[str]:
    """The command of docs/vllm.md, with the embedded model in place of a large one.

    Its options stay, so that the size of the cache is the page's.
    """
    block = PAGE.read_text().split("vllm serve ", 1)[1].split("```")[0]
    _, *options = shlex.split(block.replace("\\\n", " "))
    return [str(Path(sys.executable).with_name("vllm")), "serve", str(WEIGHTS), *options]


@contextlib.contextmanager
def started(log: Path, *options: str) -> Iterator[Server]:
    """A server that is started with the command of docs/vllm.md and more options."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    place = ("--port", str(port), "--host", "127.0.0.1", "--served-model-name", "embedded")
    told = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_LOG_STATS_INTERVAL": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [*page_command(), *SMALL, *place, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | told,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield Server(url, process.pid, log)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("server") / "log") as made:
        yield made


def wait_for(url: str, process: Any, log: Any) -> None:
    for _ in range(600):
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


def test_64_at_once_some_cancelled(server: Server, reference: Any) -> None:
    url = server.url
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
        used.append(memory(server.pid))
    assert used[1] < used[0] * 1.1
    assert total(found, "vllm:plphp_prompts_pruned_total") > 40
    assert total(found, "vllm:plphp_blocks_freed_total") > 100
    kept = total(found, "vllm:plphp_vision_tokens_kept_total")
    assert 0 < kept < total(found, "vllm:plphp_vision_tokens_total")
    for number, (request, text) in enumerate(zip(requests[:24], texts[:24], strict=True)):
        if number % 5 != 4:
            inputs = answers.inputs_of(reference, request)
            expected = answers.generated(reference.model, inputs, request)
            if min(expected.margins) > answers.MARGIN:
                assert text == reference.decode(expected.tokens)


def test_a_streamed_answer_says_what_was_kept_from_vllm_0_33_on(server: Server) -> None:
    """The stream of 0.32 has no place for it, as docs/vllm.md says."""
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    request = serving.Request((serving.picture(1),), "describe picture 1.", plphp.PLPHP(), 4)
    parts = client.chat.completions.create(
        model="embedded",
        messages=message(request),
        max_tokens=4,
        stream=True,
        stream_options={"include_usage": True},
    )
    told = any("plphp" in part.model_dump_json() for part in parts)
    assert told != vllm.__version__.startswith("0.32")


def test_a_response_says_what_was_kept(server: Server) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    request = serving.Request((serving.picture(1),), "describe picture 1.", plphp.PLPHP(), 4)
    answer = client.chat.completions.create(
        model="embedded", messages=message(request), max_tokens=4, temperature=0
    )
    told = answer.model_extra["kv_transfer_params"]["plphp"]
    assert told["vision_tokens"] > 0 and len(told["layer_classes"]) == serving.LAYERS


def test_the_log_says_what_was_pruned_at_its_usual_interval(server: Server) -> None:
    line = r"KV Transfer metrics: PLPHP prompts=\d+, unpruned=\d+, blocks freed=\d+, vision-"
    for _ in range(40):
        if re.search(line, text := server.log.read_text()):
            break
        time.sleep(0.25)
    assert re.search(line, text), text[-3000:]
    assert "WARNING" in text and "on CPUs only" in text
    assert "round_to=32" in text


@pytest.mark.slow
def test_every_engine_of_a_server_prunes(tmp_path: Path) -> None:
    """Data parallelism of a model without experts: vLLM makes engines that share nothing."""
    requests = [replace(r, policy=plphp.PLPHP()) for r in serving.random_requests(24, seed=81)]
    with started(tmp_path / "log", "--data-parallel-size", "2") as server:
        texts = asyncio.run(flood(server.url, requests))
        found = metrics(server.url)
    assert len(texts) == len(requests)
    pruned = [n for name, n in found.items() if name.startswith("vllm:plphp_prompts_pruned_total")]
    assert len(pruned) == 2 and all(pruned), "both engines prune"
