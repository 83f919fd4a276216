"""Decoders in which some layers have a window: the others are pruned, as in transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import answers
import pytest
import serving
import torch
from checkpoints import CHECKPOINTS, WEIGHTS
from safetensors.torch import load_file, save_file
from soak import preempt
from test_families import Reference

import plphp

LLAVA = CHECKPOINTS["llava"]
CHUNKED, FULL = "chunked_attention", "full_attention"
# family -> options of its config: windows that are shorter than all prompts below, and what vLLM
# takes for granted in the class
WINDOWS: dict[str, dict[str, Any]] = {
    "llava + gemma2": {"sliding_window": 24, "tie_word_embeddings": True},
    "llava + llama4": {
        "attention_chunk_size": 64,
        "layer_types": [CHUNKED, CHUNKED, CHUNKED, FULL],
        "no_rope_layers": [1, 1, 1, 0],
    },
}


def save(family: str, folder: Path) -> None:
    """Write the checkpoint.

    Tied embeddings repeat the last token, which the small embeddings and the random norm prevent.
    """
    replace(LLAVA, family=family, text=WINDOWS[family]).save(folder)
    weights = load_file(folder / WEIGHTS)
    (norm,) = [name for name in weights if name.endswith("model.norm.weight")]
    draw = torch.Generator().manual_seed(0)
    weights[norm] = torch.randn(weights[norm].shape, generator=draw) - 1  # Gemma adds 1
    if "tie_word_embeddings" in WINDOWS[family]:
        (embedding,) = [name for name in weights if name.endswith("embed_tokens.weight")]
        weights[embedding] *= 0.02
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    ("family", "share"),
    [
        ("llava + gemma2", False),
        ("llava + llama4", True),
        pytest.param("llava + gemma2", True, marks=pytest.mark.slow),
        pytest.param("llava + llama4", False, marks=pytest.mark.slow),
    ],
)
def test_tokens_equal_transformers(family: str, share: bool, tmp_path: Path) -> None:
    """In chunks, beside unpruned prompts, with preemptions, and again from the prefix cache."""
    save(family, tmp_path)
    policy = plphp.PLPHP(r=0.2, delta_r=0.2, alpha=0.9, beta=0.05)
    asked = [r for r in serving.random_requests(24, seed=200) if len(r.images) > 3][:8]
    requests = [
        replace(r, policy=policy if place % 4 else None, tokens=16) for place, r in enumerate(asked)
    ]
    options = {"share_prefix": share, "max_num_batched_tokens": 96, "max_num_seqs": 4}
    with serving.engine(model=str(tmp_path), **options) as llm:
        own = serving.scheduler_of(llm).connector.groups
        groups = serving.scheduler_of(llm).kv_cache_config.kv_cache_groups
        assert 0 < len(own) < len(groups)
        before, scheduler = serving.free_blocks(llm), serving.scheduler_of(llm)
        schedule, steps, thrown = scheduler.schedule, [], []

        def sometimes(*args: Any) -> Any:
            steps.append(1)
            if len(steps) in (6, 20):
                thrown.extend(preempt(llm))
            return schedule(*args)

        scheduler.schedule = sometimes
        prompts = [serving.prompt(llm, request) for request in requests]
        sampling = [request.sampling for request in requests]
        outputs = [
            output for _ in range(2) for output in llm.generate(prompts, sampling, use_tqdm=False)
        ]
        llm.llm_engine.step()
        assert serving.free_blocks(llm) == before and serving.state(llm) == 0
    assert thrown
    # The attention sdpa of transformers computes without Gemma 2's cap on the logits.
    reference, close, freed, seen = Reference.load(tmp_path, "eager"), 0, 0, set()
    for request, output in zip(requests * 2, outputs, strict=True):
        inputs = reference.inputs(request)
        assert inputs["input_ids"].shape[1] > 64, "the prompt leaves the windows"
        expected = answers.read(reference.model, inputs, request, answers.said(output))
        found = answers.same(output, expected)
        assert found is not False, (request, output.outputs[0].token_ids, expected.tokens)
        close += found is None
        if request.policy:
            told = output.kv_transfer_params["plphp"]
            classes = [x.layer_class[0] for x in expected.report.layers if x.layer_class[0]]
            assert told["layer_classes"] == classes and len(classes) == len(own)
            freed += told["freed_blocks"]
        seen |= {*output.outputs[0].token_ids}
    assert close <= 1 and freed > 0 and len(seen) > 1
