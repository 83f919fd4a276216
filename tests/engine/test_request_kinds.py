"""Kinds of requests: of one token, with several answers, with an adapter, and beam search."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import answers
import pytest
import serving
import torch
from PIL import Image
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest
from vllm.sampling_params import BeamSearchParams

import plphp

RANK = 8  # of the adapter
POLICY = plphp.PLPHP(r=0.3, delta_r=0.3, alpha=0.55, beta=0.45)
REQUEST = serving.Request(
    (serving.picture(3), serving.picture(4)), "describe picture 1.", POLICY, 1
)


def counted(llm: Any) -> dict[str, Any]:
    """What the plugin counts from now on, by name."""
    connector, counts = serving.scheduler_of(llm).connector, {}
    take = connector.get_kv_connector_stats

    def taken() -> Any:
        stats = take()
        for name, number in stats.data.items() if stats else ():
            counts[name] = counts.get(name, 0) + number
        return stats

    connector.get_kv_connector_stats = taken
    return counts


def test_beam_search_is_not_pruned_and_counted_as_refused() -> None:
    params, answers = BeamSearchParams(beam_width=2, max_tokens=4), []
    for made in (serving.engine(stock=True), serving.shared()):
        with made as llm:
            counts = counted(llm) if answers else {}
            prompt = serving.prompt(llm, REQUEST)
            beams = llm.beam_search([prompt], params)[0].sequences
            answers.append([beam.tokens for beam in beams])
    assert counts["refused beam search"] > 4 and "prompts" not in counts
    assert answers[0] == answers[1]


def test_a_request_that_ends_at_its_first_token_is_told_and_counted(reference: Any) -> None:
    with serving.shared() as llm:
        before, counts = serving.free_blocks(llm), counted(llm)
        first, longer = serving.generate(llm, [REQUEST, replace(REQUEST, tokens=3)])
        llm.llm_engine.step()
        assert serving.free_blocks(llm) == before
        assert serving.state(llm) == 0
    told, other = first.kv_transfer_params["plphp"], longer.kv_transfer_params["plphp"]
    assert counts["prompts"] == 2
    assert counts["blocks"] == other["freed_blocks"] > 0
    assert told == other | {"freed_blocks": 0}, "the end of the request has freed them"
    assert answers.agree(first, reference, REQUEST) is not False


def test_several_answers_of_one_request_are_pruned_alike(reference: Any) -> None:
    request = replace(REQUEST, tokens=12)
    several = request.sampling
    several.n, several.temperature, several.top_k = 3, 1.0, 1
    with serving.shared() as llm:
        before, counts = serving.free_blocks(llm), counted(llm)
        output = llm.chat(request.chat, several, use_tqdm=False)[0]
        assert serving.free_blocks(llm) == before
    assert counts["prompts"] == 3
    assert output.kv_transfer_params["plphp"]["retention"] < 1
    for answer in output.outputs:
        assert answers.agree(SimpleNamespace(outputs=[answer]), reference, request) is not False


def test_a_prompt_that_grows_is_not_pruned_and_counted_as_refused() -> None:
    """vLLM's streamed input: later parts of the prompt arrive after the first answer."""
    with serving.shared() as llm:
        before, counts, engine = serving.free_blocks(llm), counted(llm), llm.llm_engine
        grow = partial(engine.input_processor.process_inputs, resumable=True)
        engine.input_processor.process_inputs = grow
        engine.add_request("grows", serving.prompt(llm, REQUEST), REQUEST.sampling)
        for _ in range(6):
            engine.step()
        engine.abort_request(["grows"])
        for _ in range(3):
            engine.step()
        assert serving.free_blocks(llm) == before
        assert serving.state(llm) == 0
    assert counts == {"refused streamed input": 1}


def test_a_request_for_a_transfer_is_served_without_one(reference: Any) -> None:
    sampling = REQUEST.sampling
    asked = {"do_remote_prefill": True, "do_remote_decode": True, "remote_block_ids": [1]}
    sampling.extra_args["kv_transfer_params"] = asked
    with serving.shared() as llm:
        output = llm.chat(REQUEST.chat, sampling, use_tqdm=False)[0]
    assert output.kv_transfer_params["plphp"]["retention"] < 1
    assert answers.agree(output, reference, REQUEST) is not False


def test_the_smallest_requests(reference: Any) -> None:
    """Images of one vision token, one token to generate, and rates of 0."""
    dot, nothing = Image.new("RGB", (28, 28), (200, 30, 30)), plphp.PLPHP(r=0, delta_r=0)
    cases = [((dot,), POLICY), ((dot,) * 6, nothing), (REQUEST.images, nothing), ((), POLICY)]
    requests = [
        serving.Request(images, "", policy, tokens) for images, policy in cases for tokens in (1, 3)
    ]
    with serving.shared() as llm:
        before = serving.free_blocks(llm)
        outputs = serving.generate(llm, requests)
        llm.llm_engine.step()
        assert serving.free_blocks(llm) == before
        assert serving.state(llm) == 0
    for request, output in zip(requests, outputs, strict=True):
        assert answers.agree(output, reference, request) is not False


def adapter(model: Any, folder: Path) -> Any:
    """Write a random LoRA adapter of all attention projections; the model with it merged in."""
    merged, tensors = copy.deepcopy(model), {}
    draw = torch.Generator().manual_seed(0)
    for name, module in merged.model.language_model.named_modules():
        if not name.endswith(("q_proj", "k_proj", "v_proj", "o_proj")):
            continue
        out, into = module.weight.shape
        down = torch.randn(RANK, into, generator=draw) / into**0.5
        up = torch.randn(out, RANK, generator=draw) * 0.2
        module.weight.data += up @ down
        key = f"base_model.model.model.language_model.{name}"
        tensors |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


def test_requests_with_an_adapter(reference: Any, tmp_path: Path) -> None:
    """Requests without one, beside these, get wrong tokens from vLLM 0.32's CPU backend anyway."""
    requests = [replace(REQUEST, tokens=12), replace(REQUEST, tokens=12, policy=None)]
    model = adapter(reference.model, tmp_path)
    given = LoRARequest("random", 1, str(tmp_path))
    with serving.engine(enable_lora=True, max_lora_rank=RANK, max_num_batched_tokens=128) as llm:
        prompts = [serving.prompt(llm, request) for request in requests]
        sampling = [request.sampling for request in requests]
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=given)
    inputs = reference.inputs_of(REQUEST.images, REQUEST.text(reference.tokenizer))
    expected = [
        answers.read(model, inputs, request, answers.said(output))
        for request, output in zip(requests, outputs, strict=True)
    ]
    for output, wanted in zip(outputs, expected, strict=True):
        assert answers.same(output, wanted) is not False
    retention = expected[0].report.retention
    assert outputs[0].kv_transfer_params["plphp"]["retention"] == pytest.approx(retention)
    plain = answers.read(reference.model, inputs, requests[0], answers.said(outputs[0]))
    assert answers.same(outputs[0], plain) is False, "the adapter changes the answer"
