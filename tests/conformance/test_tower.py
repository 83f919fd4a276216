"""VisionZip, which chooses and merges in the vision tower, against a slow reference."""

from typing import Any

import pytest
import torch
from leaving import dropped_columns
from tower_reference import BUDGET, CASES, SHARE, made, reference

import plphp
import tiny
from invariants import EVERY, LOGITS, generate

ROWS = [tiny.RowSpec(images=2, text=24), tiny.RowSpec(images=1, text=9)]
VIDEO = [tiny.RowSpec(images=0, text=12, videos=1)]
BOTH = [tiny.RowSpec(images=1, text=12, videos=1), tiny.RowSpec(images=2, text=30)]
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "smolvlm", "internvl")
MIXED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize(
    ("name", "rows"),
    [*((name, ROWS) for name in CASES), *((name, VIDEO) for name in VIDEOS),
     *((name, BOTH) for name in MIXED)],
    ids=[*CASES, *(f"{name}-video" for name in VIDEOS), *(f"{name}-both" for name in MIXED)],
)  # fmt: skip
def test_tokens_and_logits_are_those_of_the_reference(name: str, rows: list[Any]) -> None:
    model, inputs, spans = made(name, rows)
    policy = plphp.policy("visionzip", budget=BUDGET, contextual=SHARE)
    told = EVERY[CASES[name].family].videos_told or not any(row.videos for row in rows)
    with plphp.prune(model, policy, vision_mask=None if told else spans) as pruning:
        tokens, logits = generate(model, inputs)
        report = pruning.report
    stays, wanted = reference(name, model, inputs, spans, tokens)
    gone = dropped_columns(spans, report.stages[0].stays[:, None])
    assert torch.equal((spans > 0) & ~gone, stays)
    assert (logits - wanted).abs().max() < LOGITS
    assert report.stages[0].kept == pytest.approx(float(stays.sum() / (spans > 0).sum()))
    assert name == "llava_next" or report.stages[0].kept == pytest.approx(BUDGET, abs=0.11)


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [
        ("clip", ROWS, {"num_beams": 2}),
        ("clip", ROWS, {"prefill_chunk_size": 16}),
        ("clip", ROWS, {"again": True}),
        ("qwen2_5_vl", BOTH, {"num_beams": 2}),
        ("qwen3_vl", BOTH, {"prefill_chunk_size": 16}),
    ],
)
def test_other_ways_to_generate(name: str, rows: list[Any], options: dict[str, Any]) -> None:
    model, inputs, _ = made(name, rows)
    options = dict(options)
    policy = [plphp.policy("visionzip"), plphp.policy("snapkv")]
    again = options.pop("again", False)
    with plphp.prune(model, policy) as pruning:
        wanted = generate(model, inputs)[0]
        plain = pruning.report
        if again:
            model(**inputs)  # a forward outside generate()
        else:
            tokens = generate(model, inputs, **options)[0]
        report = pruning.report
    copies = len(report.prompt) // len(plain.prompt)
    stays = plain.stages[0].stays.repeat_interleave(copies, 0)
    assert torch.equal(report.stages[0].stays, stays)
    assert again or "num_beams" in options or torch.equal(tokens, wanted)


def test_a_model_is_as_before_once_it_is_detached() -> None:
    model, inputs, _ = made("clip", ROWS)
    before = generate(model, inputs)[1]
    with plphp.prune(model, "visionzip"):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs)[1], before)
    assert all("config" not in vars(m) or type(m.config).__name__ != "TowerConfig"
               for m in model.modules())  # fmt: skip


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llava_onevision", "it resizes the features of tiles and frames"),
        ("idefics2", "its vision tokens are latents of a resampler"),
        ("ovis2", "its vision tokens are mixtures of the entries of a table"),
        ("mistral3", "it reads all images as one sequence"),
        ("pixtral", "it reads all images as one sequence"),
    ],
)
def test_towers_that_are_not_known_are_refused(family: str, why: str) -> None:
    with pytest.raises(plphp.UnsupportedModelError, match=why):
        plphp.prune(EVERY[family].build(0), "visionzip")


def test_a_mask_that_calls_an_image_text_is_refused() -> None:
    model, inputs, spans = made("clip", ROWS)
    mask = torch.where(spans == 2, 0, spans)
    said = pytest.raises(plphp.UnsupportedModeError, match="calls tokens text that it has encoded")
    with plphp.prune(model, "visionzip", vision_mask=mask), said:
        generate(model, inputs)


def test_features_without_their_tower_are_refused() -> None:
    model, inputs, _ = made("clip", ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    spans = plphp.vision_spans(model.config, inputs["input_ids"])
    said = pytest.raises(plphp.UnsupportedModeError, match="it has encoded none of this prompt")
    with plphp.prune(model, "visionzip", vision_mask=spans), said:
        model.generate(**given, max_new_tokens=2)
