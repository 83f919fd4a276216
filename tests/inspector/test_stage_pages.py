"""What a sequence method dropped is shown apart from what the heads of a layer dropped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from asking import PICTURES, QUESTION, asked, bits
from browser import opened

import plphp
from plphp.demo.model import Embedded
from plphp.inspector import examine, result_of, write_html
from plphp.inspector.plot import GONE, VEIL

CASES = {"divprune,plphp": 0, "fastv,plphp": 2}  # the first layer that some tokens never enter


def reported(embedded: Embedded, name: str) -> tuple[plphp.Report, list[Any]]:
    pictures, inputs = asked(embedded)
    with torch.inference_mode(), plphp.prune(embedded.model, name) as pruning:
        embedded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert pruning.report is not None
    return pruning.report, pictures


def left(report: plphp.Report) -> list[int]:
    """The vision tokens that the first stage left, counted from 0."""
    assert report.seen is not None and report.stages[0].stays is not None
    vision = (report.seen.spans[0] > 0).nonzero()[:, 0].tolist()
    return [vision.index(position) for position in report.stages[0].stays[0].tolist()]


@pytest.mark.parametrize("name", CASES)
def test_a_layer_says_which_tokens_entered_it(embedded: Embedded, name: str) -> None:
    report, _ = reported(embedded, name)
    run = result_of(report, name, plphp.policy(name))
    stays = left(report)
    assert 0 < len(stays) < 72
    for index, layer in enumerate(run.layers):
        if index < CASES[name]:
            assert layer.entered == ""
            continue
        assert bits(layer.entered, 72) == stays
        for head in layer.kept:
            assert set(bits(head, 72)) <= set(stays)
    assert [stage["layer"] for stage in run.stages] == [CASES[name], None]
    assert run.settings["first stage"] == repr(plphp.policy(name).first)
    assert run.settings["alpha"] == plphp.PLPHP().alpha


@pytest.mark.parametrize("name", CASES)
def test_a_figure_has_another_colour_for_what_never_entered(embedded: Embedded, name: str) -> None:
    colors = pytest.importorskip("matplotlib.colors")
    report, pictures = reported(embedded, name)
    figure = report.plot(pictures, layer=3)
    veils = [patch for axes in figure.axes[2:] for patch in axes.patches]
    drawn = [colors.to_hex(veil.get_facecolor()) for veil in veils]
    stays = left(report)
    assert drawn == [VEIL if token in stays else GONE for token in range(72)]
    earlier = report.plot(pictures, layer=0)
    found = {colors.to_hex(p.get_facecolor()) for axes in earlier.axes[2:] for p in axes.patches}
    assert (GONE in found) == (CASES[name] == 0)


@pytest.mark.parametrize("home", ["host", "int4"])
def test_recall_reads_what_entered(embedded: Embedded, home: str) -> None:
    pictures, inputs = asked(embedded)
    policies = {"two": plphp.policy("divprune,novelty")}
    options = {"rounds": 1, "oracle": True, "max_new_tokens": 5, "recall": plphp.Recall(home)}
    run = examine(embedded, inputs, policies, pictures, QUESTION, **options).runs[0]
    steps = run.steps
    assert steps is not None and any(value for row in steps.gone for value in row)
    for lost, gone in zip(steps.lost, steps.gone, strict=True):
        same = [a == b for a, b in zip(lost, gone, strict=True)]
        assert all(same) if home == "int4" else not all(same)
        assert all(a >= b - 1e-3 for a, b in zip(lost, gone, strict=True))
    for layers in steps.read:
        for layer, heads in enumerate(layers):
            own = set(bits(run.layers[layer].entered, 72))
            assert all(set(bits(head, 72)) <= own for head in heads)


@pytest.mark.parametrize("name", CASES)
def test_the_page_shows_both_stages_apart(
    browser: Any, embedded: Embedded, tmp_path: Path, name: str
) -> None:
    _, inputs = asked(embedded)
    files = [PICTURES / "a1.png", PICTURES / "a2.png"]
    policies = {name: plphp.policy(name)}
    options = {"rounds": 1, "oracle": True, "max_new_tokens": 6}
    page = examine(embedded, inputs, policies, files, QUESTION, **options)
    write_html(page, tmp_path / "report.html")
    report, _ = reported(embedded, name)
    script = """() => [...document.querySelectorAll('#pictures rect.gone')]
        .flatMap((rect) => rect.dataset.tokens.split(' ').map(Number)).sort((a, b) => a - b)"""
    with opened(browser, tmp_path / "report.html") as watched:
        shown = watched.page
        shown.get_by_role("slider", name="layer").fill("3")
        dropped = [token for token in range(72) if token not in left(report)]
        assert shown.evaluate(script) == dropped
        method = report.stages[0].method
        legend = shown.inner_text("#stages")
        assert f"dropped by {method} before layer {CASES[name]}: {len(dropped)} tokens" in legend
        captions = shown.locator("#pictures figcaption").all_inner_texts()
        halves = [sum(token < 36 for token in dropped), sum(token >= 36 for token in dropped)]
        for caption, count in zip(captions, halves, strict=True):
            assert f"{count} had been dropped before this layer" in caption
        colors = """() => ['gone', 'veil'].map((name) =>
            getComputedStyle(document.querySelector(`#stages i.${name}`)).backgroundColor)"""
        assert len(set(shown.evaluate(colors))) == 2
        assert f"left by {method} from layer {CASES[name]} on" in shown.inner_text("#summary")
        assert f"the vision tokens that {method} had left" in shown.inner_text("#steps-hint")
        assert shown.locator("#at-layers [data-gone]").count() > 0
        shown.get_by_role("slider", name="layer").fill("0")
        assert shown.evaluate(script) == (dropped if CASES[name] == 0 else [])
        assert shown.locator("#stages").is_hidden() == (CASES[name] > 0)
        assert watched.said == []
