"""What the inspector gathers is what the model did, by an independent look where there is one."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import plphp
import plphp.demo
import tiny
from plphp.demo.model import Embedded, load
from plphp.hf.replan import read
from plphp.policy import POLICIES
from plphp.report import page_of_report, render, run_of, shown_videos
from plphp.report.examine import examine, first_difference, pieces
from plphp.report.gather import pictures_of
from plphp.report.steps import steps_of
from tiny.base import RowSpec

PICTURES = Path(plphp.demo.__file__).parent / "pictures"
QUESTION = "what is brown in picture 1?"


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    return load()


def asked(embedded: Embedded, count: int = 2) -> tuple[list[Image.Image], dict[str, Any]]:
    paths = [PICTURES / f"a{number}.png" for number in range(1, count + 1)]
    pictures = [Image.open(path).convert("RGB") for path in paths]
    return pictures, embedded.inputs(pictures, QUESTION)


def reported(model: Any, inputs: dict[str, Any]) -> plphp.Report:
    with torch.inference_mode(), plphp.prune(model) as pruning:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert pruning.report is not None
    return pruning.report


def bits(text: str, count: int) -> list[int]:
    every = np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), bitorder="little")
    return np.flatnonzero(every[:count]).tolist()


def test_masks_shares_and_agreement_are_those_of_the_report(embedded: Embedded) -> None:
    _, inputs = asked(embedded)
    report = reported(embedded.model, inputs)
    vision = (plphp.vision_spans(embedded.model.config, **inputs)[0] > 0).nonzero()[:, 0].tolist()
    run = run_of(report, "plphp", plphp.PLPHP())
    for layer, found in zip(report.layers, run.layers, strict=True):
        heads = [{p for p in head.tolist() if p >= 0} for head in layer.kept[0]]
        for head, mask, share in zip(heads, found.kept, found.share, strict=True):
            assert {vision[token] for token in bits(mask, len(vision))} == head
            assert share == pytest.approx(len(head) / len(vision), abs=1e-4)
        for one, same in zip(heads, found.agreement, strict=True):
            others = [len(one & o) / len(one | o) for o in heads if o is not one]
            assert same == pytest.approx(sum(others) / len(others), abs=1e-4)
    assert sum(layer.kv_bytes for layer in run.layers) <= report.kv_bytes
    assert sum(layer.kv_bytes_full for layer in run.layers) == report.kv_bytes_full


def eager_attention(model: Any, inputs: dict[str, Any], answer: torch.Tensor) -> list[Any]:
    """Attention (H, T, N) of each layer, of the last prompt token and all answered but the last.

    By transformers' own eager code, on the untouched model.
    """
    ids = torch.cat([inputs["input_ids"], answer[None, :-1]], 1)
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        more["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(answer) - 1))
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            out = model(**{**inputs, **more}, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    return [layer[0, :, -len(answer) :] for layer in out.attentions]


@pytest.mark.parametrize("name", ["plphp", "vl-cache", "fastv"])
def test_steps_are_what_the_models_attend_to(embedded: Embedded, name: str) -> None:
    _, inputs = asked(embedded)
    model, policy = embedded.model, plphp.policy(name)
    with torch.inference_mode():
        prompt = read(model, inputs)
        with plphp.prune(model, policy) as pruning:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            report = pruning.report
        answer = out[0, inputs["input_ids"].shape[1] :]
        steps = steps_of(model, inputs, policy, prompt, answer, embedded.decode)
        again = steps_of(model, inputs, policy, prompt, answer, embedded.decode)
    assert steps == again, "the prompt's cache is left as it was"
    vision = (plphp.vision_spans(model.config, **inputs)[0] > 0).nonzero()[:, 0]
    for index, probs in enumerate(eager_attention(model, inputs, answer)):
        kept = report.layers[index].kept[0]
        group = probs.shape[0] // kept.shape[0]
        each = [torch.isin(vision, kept[h // group]) for h in range(probs.shape[0])]
        looks = [probs[h][:, vision] for h in range(probs.shape[0])]
        to_kept = torch.stack([p[:, k].sum(-1) for p, k in zip(looks, each, strict=True)])
        to_lost = torch.stack([p[:, ~k].sum(-1) for p, k in zip(looks, each, strict=True)])
        found = torch.tensor([row[index] for row in steps.full_kept])
        lost = torch.tensor([row[index] for row in steps.lost])
        assert torch.allclose(found, to_kept.mean(0), atol=2e-4)
        assert torch.allclose(lost, to_lost.mean(0), atol=2e-4)
        if index == 0:  # a token's own embedding asks: what was dropped changes only the softmax
            own = torch.tensor([row[0] for row in steps.kept])
            expected = (to_kept / (1 - to_lost)).mean(0)
            assert torch.allclose(own[1:], expected[1:], atol=2e-4)


def test_with_recall_steps_say_what_was_read_and_fetched(embedded: Embedded) -> None:
    """What a run of its own logs; what came is what a head did not have the step before."""
    pictures, inputs = asked(embedded)
    model, recall = embedded.model, plphp.Recall("host", 0.4)
    policies = {"plphp": plphp.PLPHP()}
    page = examine(
        embedded, inputs, policies, pictures, QUESTION, rounds=1, oracle=True, recall=recall
    )
    run = json.loads(json.dumps(page.to_json()))["runs"][0]
    steps = run["steps"]
    with torch.inference_mode(), plphp.prune(model, recall=replace(recall, record=True)) as pruning:
        cache = plphp.PrunedCache(model)
        out = model.generate(**inputs, past_key_values=cache, do_sample=False)
    answer = out[0, inputs["input_ids"].shape[1] :]
    assert embedded.decode(answer) == run["answer"]["text"]
    vision = (plphp.vision_spans(model.config, **inputs)[0] > 0).nonzero()[:, 0]
    log = cache.recalled()
    assert len(steps["read"]) == len(answer) - 1 == len(log[0])
    came = [0] * len(log[0])
    for layer, held in enumerate(log):
        before = [set(bits(text, len(vision))) for text in run["layers"][layer]["kept"]]
        for step, heads in enumerate(held):
            now = [set(bits(text, len(vision))) for text in steps["read"][step][layer]]
            assert [vision[sorted(head)].tolist() for head in now] == heads[0].tolist()
            came[step] += sum(len(b - a) for a, b in zip(before, now, strict=True))
            before = now
    assert steps["fetched"] == [0, *came] and sum(came) > 0
    assert run["recall"] == pruning.report.recall.to_dict()
    for layer, probs in enumerate(eager_attention(model, inputs, answer)):
        for step, heads in enumerate(log[layer]):
            read_here = torch.stack([torch.isin(vision, head) for head in heads[0]])
            look = probs[:, step + 1][:, vision]
            group = len(look) // len(read_here)
            to_read = (look * read_here.repeat_interleave(group, 0)).sum(-1)
            to_rest = look.sum(-1) - to_read
            found = [steps[name][step + 1][layer] for name in ("full_kept", "lost")]
            assert found == pytest.approx([float(to_read.mean()), float(to_rest.mean())], abs=2e-4)
            if layer == 0:  # as above: what was not read changes only the softmax
                own = float((to_read / (1 - to_rest)).mean())
                assert steps["kept"][step + 1][0] == pytest.approx(own, abs=2e-4)


def test_reads_of_a_long_answer_are_cut_where_the_page_would_grow(embedded: Embedded) -> None:
    _, inputs = asked(embedded)
    model = embedded.model
    with torch.inference_mode():
        prompt = read(model, inputs)
    answer = torch.full((9,), int(prompt.first))
    recall = plphp.Recall("host")
    every, some = (
        steps_of(model, inputs, plphp.PLPHP(), prompt, answer, recall=recall, room=room)
        for room in (10**6, 2000)
    )
    assert len(every.read) == 8 and len(every.fetched) == 9
    assert 0 < len(some.read) < 8 and some.read == every.read[: len(some.read)]
    assert len(json.dumps(some.read)) <= 2000 and some.fetched == every.fetched


@pytest.mark.parametrize("home", ["int4", "int2"])
def test_codes_are_all_read(embedded: Embedded, home: str) -> None:
    """Nothing is lost, and attention is the full model's but for what rounding does to keys."""
    pictures, inputs = asked(embedded)
    policies, recall = {"plphp": plphp.PLPHP()}, plphp.Recall(home)
    page = examine(
        embedded, inputs, policies, pictures, QUESTION, rounds=1, oracle=True, recall=recall
    )
    steps, told = page.runs[0].steps, page.runs[0].recall
    assert steps.read == () and steps.fetched == ()
    assert all(value == 0 for row in steps.lost for value in row)
    assert steps.kept[0] == steps.full_kept[0]
    first = [(own[0], full[0]) for own, full in zip(steps.kept, steps.full_kept, strict=True)]
    assert all(own == pytest.approx(full, abs=0.1) for own, full in first)
    assert told["home"] == home and 0 < told["resident"] < told["full"] and told["parked"] > 0


def test_nothing_dropped_is_nothing_lost(embedded: Embedded) -> None:
    pictures, inputs = asked(embedded)
    whole = {"all": plphp.PLPHP(r=1.0, delta_r=0.0)}
    page = examine(embedded, inputs, whole, pictures, QUESTION, rounds=1, oracle=True)
    run = page.runs[0]
    assert run.differs is None and run.retention == 1 and run.steps is not None
    assert all(value == 0 for row in run.steps.lost for value in row)
    for own, full in zip(run.steps.kept, run.steps.full_kept, strict=True):
        assert own == pytest.approx(full, abs=2e-4)
    assert max(run.steps.kl) < 1e-4
    assert "".join(run.answer.tokens) == run.answer.text


@pytest.mark.parametrize("name", [name for name in POLICIES if POLICIES[name]().kind != "images"])
def test_every_method_has_a_page(embedded: Embedded, name: str) -> None:
    pictures, inputs = asked(embedded, 1)
    policies = {name: plphp.policy(name)}
    page = examine(
        embedded, inputs, policies, pictures, QUESTION, rounds=1, oracle=True, max_new_tokens=4
    )
    assert f'"{name}"' in render(page)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_says_where_its_tokens_lie(family: str) -> None:
    """Places are found from the report alone; what processors do is tested in test_patches."""
    tested = tiny.FAMILIES[family]
    if not tested.available:
        pytest.skip("not in this transformers")
    model = tested.build(0)
    inputs, _ = tested.make_inputs(model, [RowSpec(images=2, text=40)], 0)
    report = reported(model, inputs)
    sizes = inputs.get("image_sizes", torch.tensor([[90, 120], [120, 90]]))
    pictures = [Image.new("RGB", (int(w), int(h))) for h, w in sizes.tolist()]
    for picture in pictures_of(report, pictures):
        assert len(picture.boxes) == picture.tokens, family
        places = [box for box in picture.boxes if box is not None]
        assert min(b[0] for b in places) == 0 and min(b[1] for b in places) == 0
        assert max(b[2] for b in places) <= picture.width
        assert max(b[3] for b in places) <= picture.height


def test_frames_of_a_video_are_those_that_the_model_was_shown() -> None:
    """Frames of one colour each, cut by the real processor's arithmetic, come back in order."""
    t, h, w, merge, patch = 3, 4, 6, 2, 4
    frames = torch.stack([torch.full((3, h * patch, w * patch), float(i)) for i in range(2 * t)])
    frames[0, :, :patch, patch : 2 * patch] = 9.0  # a mark on the second patch of the first row
    split = frames.view(t, 2, 3, h // merge, merge, patch, w // merge, merge, patch)
    rows = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
    config = type("C", (), {"vision_config": type("V", (), {})()})()
    config.vision_config.spatial_merge_size, config.vision_config.patch_size = merge, patch
    inputs = {"pixel_values_videos": rows, "video_grid_thw": torch.tensor([[t, h, w]])}
    (video,) = shown_videos(config, inputs)
    assert [frame.size for frame in video] == [(w * patch, h * patch)] * t
    grey = [np.asarray(frame)[-1, -1, 0] for frame in video]
    assert grey == [0, round(255 * 2 / 9), round(255 * 4 / 9)]
    first = np.asarray(video[0])[..., 0]
    assert first[:patch, patch : 2 * patch].min() == 255 and first[patch:].max() == 0


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "glm4v"])
def test_videos_are_strips_of_frames(family: str) -> None:
    tested = tiny.FAMILIES[family]
    model = tested.build(0)
    inputs, _ = tested.make_inputs(model, [RowSpec(images=0, text=40, videos=1)], 0)
    report = reported(model, inputs)
    videos = shown_videos(model.config, inputs)
    (picture,) = pictures_of(report, videos)
    assert len(picture.frames) == len(videos[0]) == max(picture.frame) + 1 > 1
    in_each = [picture.frame.count(frame) for frame in range(len(picture.frames))]
    assert len(set(in_each[1:])) == 1


def test_a_report_draws_itself(embedded: Embedded, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pictures, inputs = asked(embedded)
    report = reported(embedded.model, inputs)
    figure = report.plot(pictures, layer=1)
    figure.savefig(tmp_path / "figure.png")
    veils = [patch for axes in figure.axes[2:] for patch in axes.patches]
    heads = report.layers[1].kept[0]
    vision = (plphp.vision_spans(embedded.model.config, **inputs)[0] > 0).nonzero()[:, 0]
    share = (vision[:, None, None] == heads).any(-1).float().mean(-1)
    assert [p.get_alpha() for p in veils] == pytest.approx((0.86 * (1 - share)).tolist(), abs=1e-6)
    assert len(report.plot().axes) == 2
    report.to_html(tmp_path / "page.html", pictures, prompt=QUESTION, answer="the S")
    assert "the S" in (tmp_path / "page.html").read_text()
    shown = report._repr_html_()
    assert shown is not None and shown.startswith("<iframe srcdoc=")
    assert "<script" not in shown, "a notebook's own page is left alone"
    with pytest.raises(plphp.InputError, match="2 images"):
        report.plot(pictures[:1])


def test_rows_of_a_batch_have_pages_of_their_own(embedded: Embedded) -> None:
    one, _ = asked(embedded, 1)
    both, alone = asked(embedded, 2)
    rows = embedded.batch([(one, "describe picture 1."), (both, QUESTION)])
    with torch.inference_mode(), plphp.prune(embedded.model) as pruning:
        embedded.model.generate(**rows, max_new_tokens=2, do_sample=False)
    page = page_of_report(pruning.report, both, row=1)
    single = page_of_report(reported(embedded.model, alone), both)
    assert page.pictures == single.pictures
    masks = [[layer.kept for layer in p.runs[0].layers] for p in (page, single)]
    assert masks[0] == masks[1]


def test_where_answers_part() -> None:
    a, b = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert first_difference(a, b) == 1 and first_difference(a, a) is None
    assert first_difference(a, a[:2]) == 2


def test_pieces_of_a_character_come_with_its_last_token() -> None:
    parts = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]

    def decode(ids: torch.Tensor) -> str:
        return b"".join(parts[i] for i in ids.tolist()).decode(errors="replace")

    assert pieces(decode, torch.arange(4)) == ("a", "", "é", "b")
