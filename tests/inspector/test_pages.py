"""What the inspector gathers is what the model did, by an independent look where there is one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import QUESTION, asked, bits, eager_attention
from PIL import Image

import plphp
import tiny
from plphp.bench import Way
from plphp.demo.model import Embedded
from plphp.hf.shared_prefill import read
from plphp.inspector import page_of_report, render, result_of, shown_videos
from plphp.inspector.examine import examine, first_difference, pieces
from plphp.inspector.gather import pictures_of
from plphp.inspector.steps import steps_of
from plphp.policy import POLICIES
from tiny.base import RowSpec


def reported(model: Any, inputs: dict[str, Any]) -> plphp.Report:
    with torch.inference_mode(), plphp.prune(model) as pruning:
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert pruning.report is not None
    return pruning.report


def test_masks_shares_and_agreement_are_those_of_the_report(embedded: Embedded) -> None:
    _, inputs = asked(embedded)
    report = reported(embedded.model, inputs)
    vision = (plphp.vision_spans(embedded.model.config, **inputs)[0] > 0).nonzero()[:, 0].tolist()
    run = result_of(report, "plphp", plphp.PLPHP())
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


STAGES = ["divprune,novelty", "fastv,plphp"]


@pytest.mark.parametrize("name", ["plphp", "vl-cache", "fastv", *STAGES])
def test_steps_are_what_the_models_attend_to(embedded: Embedded, name: str) -> None:
    _, inputs = asked(embedded)
    model, policy = embedded.model, plphp.policy(name)
    way = Way(name, policy)
    with torch.inference_mode():
        prompt = read(model, inputs)
        with plphp.prune(model, policy) as pruning:
            out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
            report = pruning.report
        answer = out[0, inputs["input_ids"].shape[1] :]
        steps = steps_of(model, inputs, way, prompt, answer, embedded.decode)
        again = steps_of(model, inputs, way, prompt, answer, embedded.decode)
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
        entered = report.entered(index)
        assert bool(steps.gone) == (name in ("fastv", *STAGES))
        if steps.gone:
            before = torch.zeros_like(vision).bool()
            if entered is not None:
                before = ~torch.isin(vision, entered[0])
            to_gone = torch.stack([p[:, before].sum(-1) for p in looks]).mean(0)
            found = torch.tensor([row[index] for row in steps.gone])
            assert torch.allclose(found, to_gone, atol=2e-4)
            assert (steps.kept[0][index] is None) == (entered is not None)
        if index == 0:  # a token's own embedding asks: what was dropped changes only the softmax
            own = torch.tensor([row[0] for row in steps.kept[1:]])
            expected = (to_kept / (1 - to_lost)).mean(0)
            assert torch.allclose(own, expected[1:], atol=2e-4)


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


@pytest.mark.parametrize(
    "name", [*(name for name in POLICIES if POLICIES[name]().kind != "images"), *STAGES]
)
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
    with pytest.raises(plphp.InputError, match="images and videos of the prompt: 2, and given: 1"):
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


def test_the_first_difference_of_two_answers_is_found() -> None:
    a, b = torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3])
    assert first_difference(a, b) == 1 and first_difference(a, a) is None
    assert first_difference(a, a[:2]) == 2


def test_pieces_of_a_character_come_with_its_last_token() -> None:
    parts = [b"a", "é".encode()[:1], "é".encode()[1:], b"b"]

    def decode(ids: torch.Tensor) -> str:
        return b"".join(parts[i] for i in ids.tolist()).decode(errors="replace")

    assert pieces(decode, torch.arange(4)) == ("a", "", "é", "b")
