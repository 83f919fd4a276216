"""Serves requests in modes that need processes of their own: `elsewhere.py KIND`.

KIND is a `Mode.kind`. Each line of the standard input is a JSON list [mode, count, seed, out]: the
mode is served in a fork of this process, which has imported vLLM, and its exit status is printed.
What it found is written to the file `out`, and what it prints to `out`.log.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import graph_standin
import standins

import plphp


@dataclass(frozen=True)
class Mode:
    """A process.

    options: of the engine
    environment: of the process
    standins: what it has from a GPU, see `standins`
    hard: whether it is short of blocks, aborts requests, and requests share prefixes
    tiny: whether two small requests are served, because a step takes seconds
    family: name of a checkpoint in place of the embedded model
    slow: whether only `make test-vllm-all` runs it
    """

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    standins: tuple[str, ...] = ()
    hard: bool = False
    tiny: bool = False
    family: str = ""
    slow: bool = False

    @property
    def block(self) -> int:
        """The number of tokens in a block: FLASH_ATTN takes 16, the CPU's attention 32."""
        return 16 if {"flash", "flashinfer", "triton"} & {*self.standins} else 32

    @property
    def kind(self) -> str:
        """What vLLM must find when it is imported: "triton", or "plain" for a CPU's packages."""
        return "triton" if {"triton", "v2"} & {*self.standins} else "plain"

    def requests(self, count: int, seed: int) -> list[Any]:
        import serving

        if self.hard:
            few = crowd(self.block)
            return few + serving.related_requests(count - len(few), seed)
        if self.tiny:
            policy = plphp.PLPHP(r=0.3, delta_r=0)  # a block of 16 of 32 vision tokens goes
            images = tuple(serving.picture(place, most=4, least=4) for place in range(3))
            asked = ((images[:2], policy), (images[1:], None))
            return [serving.Request(few, "hello", how, 2) for few, how in asked]
        if self.family:
            made = [r for r in serving.random_requests(3 * count, seed) if len(r.images) > 3]
            policy = plphp.PLPHP(r=0.3, delta_r=0.2, alpha=0.6, beta=0.3)
            return [replace(r, policy=policy, tokens=4) for r in made[:2]] + [
                replace(made[2], policy=None, tokens=4)
            ]
        made = serving.random_requests(count, seed)
        return twice(made, self.block) if "graphs" in self.standins else made

    def engine(self, folder: Path) -> dict[str, Any]:
        """The options of the engine. folder: of the checkpoint of a family, which is written"""
        options = {"block_size": self.block, "max_num_batched_tokens": 128} | self.options
        if self.family:
            from checkpoints import CHECKPOINTS, GEMMA3

            {**CHECKPOINTS, "gemma3": GEMMA3}[self.family].save(folder)
            options["model"] = str(folder)
        if self.hard:  # a pool for one sequence of the greatest length
            import serving

            options["num_gpu_blocks_override"] = serving.LAYERS * -(-LONGEST // self.block) + 1
            options["max_model_len"] = LONGEST
            options["limit_mm_per_prompt"] = {"image": 4, "video": 1}
        return options


def twice(made: list[Any], block: int) -> list[Any]:
    """The first half of some requests, twice, and prompts of a multiple of `block` tokens plus one.

    The second time the prefix cache holds all of a prompt but the last token.
    """
    import torch

    from plphp.demo.model import load

    embedded, out = load(torch.float32), []
    for request in made[: len(made) // 2]:
        for more in range(block * 4):
            longer = replace(request, question=request.question + "." * more)
            inputs = embedded.inputs_of(longer.images, longer.text(embedded.tokenizer))
            if inputs["input_ids"].shape[1] % block == 1:
                out.append(longer)
                break
    return out + out


LONGEST = 264  # tokens of a prompt and its answer in hard modes; the engine cuts longer answers
CROWD = 4


def crowd(block: int) -> list[Any]:
    """Requests that together do not fit into the pool of a hard mode, whatever the weights.

    A prompt has 78 tokens, 64 of them of one image, and every layer keeps half of these. Three
    prompts fit beside each other, and after 40 more tokens in blocks of 16 (60 in blocks of 32) of
    each request they do not.
    """
    import serving

    half = plphp.PLPHP(r=0.5, delta_r=0)
    images = [serving.picture(seed, most=8, least=8) for seed in range(CROWD)]
    tokens = 40 if block == 16 else 60
    return [serving.Request((image,), "hello", half, tokens) for image in images]


def hard(*names: str, slow: bool = False) -> Mode:
    return Mode(standins=names, hard=True, slow=slow)


# What vLLM sets on CUDA where image tokens attend to each other in both directions.
BOTH_WAYS = {"disable_chunked_mm_input": True}
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
MODES: dict[str, Mode] = {
    "multiprocess": Mode({}, APART | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}),
    "compiled": Mode({"enforce_eager": False}, slow=True),
    "tensor parallel": Mode(
        {"tensor_parallel_size": 2}, APART | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    ),
    "bfloat16": Mode({"dtype": "bfloat16"}),
    "FLASH_ATTN": hard("flash"),
    "lengths of the host": hard("flashinfer"),
    "TRITON_ATTN": Mode(standins=("triton",), tiny=True, family="qwen2_vl"),
    "asynchronous": hard("async"),
    "V2": hard("v2", slow=True),
    "V2, FLASH_ATTN, asynchronous": hard("v2", "flash", "async"),
    "V2, FLASH_ATTN": hard("v2", "flash", slow=True),
    "V2, asynchronous": hard("v2", "async", slow=True),
    "FLASH_ATTN, asynchronous": hard("flash", "async", slow=True),
    "full graphs": Mode({"full_graphs": True}, standins=("flash", "graphs"), slow=True),
    "V2, TRITON_ATTN": Mode(standins=("triton", "v2"), tiny=True, family="qwen2_vl", slow=True),
    "V2, full graphs, asynchronous": Mode(
        {"full_graphs": True}, standins=("v2", "flash", "async", "graphs")
    ),
    "Gemma 3, TRITON_ATTN": Mode(BOTH_WAYS, standins=("triton",), family="gemma3", slow=True),
    "V2, Gemma 3, TRITON_ATTN": Mode(
        BOTH_WAYS, standins=("triton", "v2"), family="gemma3", slow=True
    ),
    "CPU_ATTN": hard(slow=True),
}


FOUND = ("preempted", "preempted after pruning", "aborted", "blocks left", "entries left")


def main(kind: str) -> None:
    sys.path.append(str(Path(__file__).parents[1]))  # of the tiny models
    if kind == "triton":
        os.environ.update(standins.environment(("triton",)))
        standins.find_triton()
    import serving  # noqa: F401 - takes eleven seconds, once for all modes

    for line in sys.stdin:
        child = os.fork()
        if not child:
            serve_mode(*json.loads(line))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def serve_mode(name: str, count: int, seed: int, out: str) -> None:
    log = os.open(out + ".log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    mode = MODES[name]
    os.environ.update(mode.environment | standins.environment(mode.standins))
    for standin in mode.standins:
        standins.install(standin)
    import serving

    requests = mode.requests(count, seed)
    found = dict.fromkeys(FOUND, 0)
    with serving.engine(**mode.engine(Path(out).with_suffix(""))) as llm:
        config = llm.llm_engine.vllm_config
        if "graphs" in mode.standins:
            graph_standin.record(llm)
        assert config.scheduler_config.async_scheduling == ("async" in mode.standins)
        assert config.use_v2_model_runner == ("v2" in mode.standins)
        if mode.hard:
            outputs = serve(llm, requests, random.Random(seed), found)
        else:
            outputs = dict(enumerate(serving.generate(llm, requests)))
            found |= graph_standin.counts
    answers = {
        place: {
            "prompt": len(o.prompt_token_ids),
            "tokens": list(o.outputs[0].token_ids),
            "told": o.kv_transfer_params,
        }
        for place, o in outputs.items()
    }
    with open(out, "w") as file:
        json.dump({"answers": answers, "found": found}, file)


def serve(llm: Any, requests: list[Any], rng: random.Random, found: dict[str, int]) -> Any:
    """The outputs by place, without those of requests that are aborted at a random step.

    found: gets the numbers of `FOUND`
    """
    import serving

    engine, scheduler = llm.llm_engine, serving.scheduler_of(llm)
    before, throw = serving.free_blocks(llm), scheduler._preempt_request
    left = {place: rng.randrange(1, 16) for place in range(CROWD, len(requests), 5)}
    added, outputs, alive = 0, {}, set()

    def thrown(request: Any, *args: Any, **kwargs: Any) -> None:
        prompt = scheduler.connector.scheduler.prompts.get(request.request_id)
        found["preempted"] += 1
        found["preempted after pruning"] += prompt is not None and prompt.choice is not None
        throw(request, *args, **kwargs)

    scheduler._preempt_request = thrown
    while added < len(requests) or alive:
        while added < len(requests) and len(alive) < 8:
            request = requests[added]
            engine.add_request(str(added), serving.prompt(llm, request), request.sampling)
            alive.add(added)
            added += 1
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
                alive.discard(int(output.request_id))
        for place in alive & left.keys():
            left[place] -= 1
            if left[place] == 0:
                engine.abort_request([str(place)])
                alive.discard(place)
                found["aborted"] += 1
    for _ in range(3):  # the workers hear of the last end with the next step
        engine.step()
    found["blocks left"] = before - serving.free_blocks(llm)
    found["entries left"] = serving.state(llm)
    return outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
