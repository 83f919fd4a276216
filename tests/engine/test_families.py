"""Model families in vLLM: tokens equal those of plphp on transformers, for images and videos.

PLPHP_WRITE_DOCS=1 writes the table of docs/vllm-models.md from these requests.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import answers
import pytest
import serving
import torch
import transformers
from checkpoints import CHECKPOINTS

import plphp
import tiny
from tiny import IMAGE, VIDEO

PAGE = Path(__file__).parents[2] / "docs" / "vllm-models.md"
ENDING = "ForConditionalGeneration"  # of every class, left out to make the table narrow


@dataclass(frozen=True)
class Reference:
    """A checkpoint that is loaded in transformers."""

    model: Any
    processor: Any

    @staticmethod
    def load(folder: Path, attention: str = "sdpa") -> Reference:
        """attention: name of the attention function in transformers"""
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(folder, attn_implementation=attention)
        return Reference(model.eval(), transformers.AutoProcessor.from_pretrained(folder))

    def inputs(self, request: serving.Request) -> Any:
        text = request.text(self.processor.tokenizer)
        return answers.processed(self.processor, request, text)

    def spans(self, inputs: Any, request: serving.Request) -> torch.Tensor:
        """The spans (1, N) as vLLM counts images: all frames of a video are one image."""
        spans, videos = plphp.vision_spans(self.model.config, **inputs), iter(request.videos)
        parts = [0]  # the number in vLLM of every image and frame
        for number, kind in enumerate(request.kinds, 1):
            parts += [number] * (len(next(videos)) if kind == "video" else 1)
        if spans.max() == len(parts) - 1 > len(request.kinds):
            spans = torch.tensor(parts)[spans]
        return spans

    def answer(
        self, request: serving.Request, given: Sequence[int], round_to: int = serving.BLOCK
    ) -> answers.Answer:
        """What is said to an engine's tokens after a request; images are counted as in vLLM."""
        inputs = self.inputs(request)
        spans = self.spans(inputs, request)
        return answers.read(self.model, inputs, request, given, round_to, spans)


def requests_of(name: str) -> list[serving.Request]:
    """24 requests: the first half has images, the second also videos, if the family has them."""
    rng = random.Random(name)
    requests = serving.random_requests(24, seed=100 + list(CHECKPOINTS).index(name))
    thresholds = [rng.uniform(0.4, 0.9) for _ in requests]
    for place, (request, beta) in enumerate(zip(requests, thresholds, strict=True)):
        if request.policy:
            policy = replace(request.policy, beta=beta, alpha=beta + rng.uniform(0, 0.2))
            requests[place] = replace(request, policy=policy)
    frames = CHECKPOINTS[name].frames
    for place in range(len(requests) // 2, len(requests) if frames else 0):
        length, request = rng.choice(frames), requests[place]
        videos = tuple(serving.film(rng, length) for _ in range(rng.choice((0, 1, 1, 2))))
        first = {"images": request.images[:2], "words": request.words[:2]}
        requests[place] = replace(request, **first, videos=videos)
    return requests


def alike(ids: Sequence[int]) -> list[int]:
    """The ids with video placeholders replaced by image placeholders, which the model ignores."""
    return [IMAGE if token == VIDEO else token for token in ids]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if made.slow else [])
        for name, made in CHECKPOINTS.items()
    ],
)
def test_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    check(name, requests_of(name), tmp_path)


ORDERS = (
    ("video", "image"),
    ("video", "image", "video"),
    ("image", "video", "image"),
    ("video", "video", "image"),
)


@pytest.mark.parametrize("name", ["qwen2_vl", pytest.param("internvl", marks=pytest.mark.slow)])
def test_videos_stand_before_images(name: str, tmp_path: Path) -> None:
    rng, requests = random.Random(name), []
    for order in ORDERS * 3:
        beta = rng.uniform(0.4, 0.9)
        policy = plphp.PLPHP(r=0.3, delta_r=0.3, beta=beta, alpha=beta + rng.uniform(0, 0.2))
        images = tuple(serving.picture(rng.randrange(10**6)) for kind in order if kind == "image")
        videos = tuple(serving.film(rng, 4) for kind in order if kind == "video")
        words = tuple(rng.choice(serving.WORDS) for _ in order)
        requests.append(serving.Request(images, "what is it?", policy, 10, words, videos, order))
    check(name, requests, tmp_path)


def check(name: str, requests: list[serving.Request], folder: Path) -> None:
    """Serve requests of a family and compare with transformers. folder: for the checkpoint"""
    CHECKPOINTS[name].save(folder)
    limits = {"image": 6, "video": 2 if CHECKPOINTS[name].frames else 0}
    with serving.engine(
        model=str(folder), limit_mm_per_prompt=limits, max_num_batched_tokens=96
    ) as llm:
        before = serving.free_blocks(llm)
        prompts = [serving.prompt(llm, request) for request in requests]
        outputs = llm.generate(prompts, [r.sampling for r in requests], use_tqdm=False)
        assert serving.free_blocks(llm) == before
    reference, close, classes = Reference.load(folder), 0, set()
    for request, output in zip(requests, outputs, strict=True):
        inputs = reference.inputs(request)
        assert alike(inputs["input_ids"][0].tolist()) == alike(output.prompt_token_ids)
        spans = reference.spans(inputs, request)
        expected = answers.read(reference.model, inputs, request, answers.said(output), mask=spans)
        found = answers.same(output, expected)
        assert found is not False, (request, output.outputs[0].token_ids, expected.tokens)
        close += found is None
        if request.policy and (request.images or request.videos):
            told = output.kv_transfer_params["plphp"]
            assert told["vision_tokens"] == int((spans > 0).sum())
            assert told["layer_classes"] == [x.layer_class[0] for x in expected.report.layers]
            assert told["retention"] == pytest.approx(expected.report.retention)
            classes |= set(told["layer_classes"])
    assert close <= 1
    assert len(classes) == 3


def test_the_page_has_the_table() -> None:
    table = [
        "| family | class in vLLM | images | videos | tokens | what differs from transformers |",
        "|---|---|--:|--:|--:|---|",
    ]
    for name, checkpoint in CHECKPOINTS.items():
        requests = requests_of(name)
        counts = [
            sum(len(request.images) for request in requests),
            sum(len(request.videos) for request in requests),
            sum(request.tokens for request in requests),
        ]
        cells = [
            name,
            f"`{tiny.FAMILIES[name].model_class.removesuffix(ENDING)}`",
            *map(str, counts),
            checkpoint.differs,
        ]
        table.append(f"| {' | '.join(cells)} |")
    found = re.compile(r"\| family .*?\n\n", re.S)
    text, made = PAGE.read_text(), "\n".join(table) + "\n\n"
    if os.environ.get("PLPHP_WRITE_DOCS"):
        PAGE.write_text(found.sub(lambda _: made, text))
    assert found.findall(PAGE.read_text()) == [made]
