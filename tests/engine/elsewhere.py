"""Serves requests in a mode that needs a process of its own: `elsewhere.py MODE COUNT SEED OUT`."""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import graph_standin
import standins


@dataclass(frozen=True)
class Mode:
    """A process.

    options: of the engine
    environment: of the process
    standins: what it has from a GPU, see `standins`
    hard: whether it is short of blocks, aborts requests, and requests share prefixes
    tiny: whether few small requests are served, because a step takes seconds
    slow: whether only `make test-vllm-all` runs it
    """

    options: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    standins: tuple[str, ...] = ()
    hard: bool = False
    tiny: bool = False
    slow: bool = False

    @property
    def block(self) -> int:
        """The number of tokens in a block: FLASH_ATTN takes 16, the CPU's attention 32."""
        return 16 if {"flash", "flashinfer", "triton"} & {*self.standins} else 32

    def requests(self, count: int, seed: int) -> list[Any]:
        import serving

        if self.hard:
            return serving.related_requests(count, seed)
        if self.tiny:
            made = [r for r in serving.random_requests(3 * count, seed, most=4) if r.images]
            return [replace(r, images=r.images[:2], tokens=3) for r in made[:3]]
        made = serving.random_requests(count, seed)
        return twice(made, self.block) if "graphs" in self.standins else made

    def engine(self) -> dict[str, Any]:
        """The options of the engine."""
        options = {"block_size": self.block, "max_num_batched_tokens": 128} | self.options
        if self.hard:  # a pool for one sequence of 264 tokens, the longest has 261
            import serving

            options["num_gpu_blocks_override"] = serving.LAYERS * -(-264 // self.block) + 1
            options["max_model_len"] = 264
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


def hard(*names: str, slow: bool = False) -> Mode:
    return Mode(standins=names, hard=True, slow=slow)


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
    "TRITON_ATTN": Mode(standins=("triton",), tiny=True),
    "asynchronous": hard("async"),
    "V2": hard("v2", slow=True),
    "V2, FLASH_ATTN, asynchronous": hard("v2", "flash", "async"),
    "V2, FLASH_ATTN": hard("v2", "flash", slow=True),
    "V2, asynchronous": hard("v2", "async", slow=True),
    "FLASH_ATTN, asynchronous": hard("flash", "async", slow=True),
    # new modes at the end: the place of a mode is the seed of its requests
    "full graphs": Mode({"full_graphs": True}, standins=("flash", "graphs")),
    "V2, TRITON_ATTN": Mode(standins=("triton", "v2"), tiny=True, slow=True),
}


def main(name: str, count: str, seed: str, out: str) -> None:
    mode = MODES[name]
    os.environ.update(mode.environment | standins.environment(mode.standins))
    for standin in mode.standins:
        standins.install(standin)
    import serving

    requests = mode.requests(int(count), int(seed))
    found = {"preempted": 0, "blocks left": 0, "entries left": 0}
    with serving.engine(**mode.engine()) as llm:
        config = llm.llm_engine.vllm_config
        if "graphs" in mode.standins:
            graph_standin.record(llm)
        assert config.scheduler_config.async_scheduling == ("async" in mode.standins)
        assert config.use_v2_model_runner == ("v2" in mode.standins)
        if mode.hard:
            outputs = serve(llm, requests, random.Random(int(seed)), found)
        else:
            outputs = dict(enumerate(serving.generate(llm, requests)))
            found |= graph_standin.counts
    answers = {
        name: {"tokens": list(o.outputs[0].token_ids), "told": o.kv_transfer_params}
        for name, o in outputs.items()
    }
    with open(out, "w") as file:
        json.dump({"answers": answers, "found": found}, file)


def serve(llm: Any, requests: list[Any], rng: random.Random, found: dict[str, int]) -> Any:
    """The outputs by place, without those of requests that are aborted at a random step.

    found: gets what was preempted, and the blocks and entries that are left at the end
    """
    import serving

    engine, scheduler = llm.llm_engine, serving.scheduler_of(llm)
    before, throw = serving.free_blocks(llm), scheduler._preempt_request
    left = {place: rng.randrange(1, 20) for place in range(2, len(requests), 5)}
    added, outputs, alive = 0, {}, set()

    def thrown(*args: Any, **kwargs: Any) -> None:
        found["preempted"] += 1
        throw(*args, **kwargs)

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
    for _ in range(3):  # the workers hear of the last end with the next step
        engine.step()
    found["blocks left"] = before - serving.free_blocks(llm)
    found["entries left"] = serving.state(llm)
    return outputs


if __name__ == "__main__":
    main(*sys.argv[1:])
