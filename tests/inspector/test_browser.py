"""The inspector's page as a reader has it: a file, a browser, no network."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import PHONE, WIDE, kept, opened, shares
from PIL import Image

import plphp
import plphp.demo
from plphp.demo.model import Embedded
from plphp.inspector import Page, examine, write_html

PICTURES = Path(plphp.demo.__file__).parent / "pictures"
EVIL = "what is <script>document.title = 'hacked'</script> </script><b>brown</b> in picture 1?"


@dataclass(frozen=True)
class Made:
    path: Path
    page: Page
    report: plphp.Report


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedded: Embedded) -> Made:
    """Three pictures, one of an unfriendly name, two policies, the oracle; and a report apart."""
    folder = tmp_path_factory.mktemp("page")
    named = folder / "<img src=x onerror=alert(1)>.png"
    pictures = [PICTURES / "a1.png", PICTURES / "a2.png", named]
    named.write_bytes((PICTURES / "a3.png").read_bytes())
    inputs = embedded.inputs([Image.open(p).convert("RGB") for p in pictures], EVIL)
    policies = {name: plphp.policy(name) for name in ("plphp", "random")}
    options = {"rounds": 1, "oracle": True, "max_new_tokens": 12}
    page = examine(embedded, inputs, policies, pictures, EVIL, **options)
    path = folder / "report.html"
    write_html(page, path)
    with torch.inference_mode(), plphp.prune(embedded.model) as pruning:
        embedded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert pruning.report is not None
    return Made(path, page, pruning.report)


def expected(report: plphp.Report, layer: int, head: int) -> list[int]:
    """Kept vision tokens by the report, counted among vision tokens from 0."""
    every = sorted({p for a in report.layers for p in a.kept[0].flatten().tolist() if p >= 0})
    if len(every) < report.layers[0].vision[0]:  # some token that no layer and head keeps
        assert report.seen is not None
        every = (report.seen.spans[0] > 0).nonzero()[:, 0].tolist()
    row = report.layers[layer].kept[0, head]
    return [every.index(position) for position in row[row >= 0].tolist()]


def test_sliders_and_keys_show_exactly_what_the_report_kept(browser: Any, made: Made) -> None:
    with opened(browser, made.path) as watched:
        page, report = watched.page, made.report
        page.get_by_role("slider", name="layer").fill("3")
        for head in range(4):
            page.get_by_role("slider", name="KV head").fill(str(head))
            assert kept(page) == expected(report, 3, head)
        page.locator("#grid").focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowUp")
        assert kept(page) == expected(report, 4, 2)
        assert "layer 4, KV head 2" in page.inner_text("#chosen")
        page.keyboard.press("u")
        heads = [set(expected(report, 4, head)) for head in range(4)]
        assert kept(page) == sorted(set.union(*heads))
        page.get_by_label("number of heads that keep a token").check()
        assert shares(page) == {
            token: sum(token in head for head in heads) / 4 for token in range(made.page.vision)
        }
        page.locator('#grid [data-layer="1"][data-head="0"]').click()
        assert kept(page) == expected(report, 1, 0)


def test_it_loads_offline_says_nothing_and_prompts_stay_text(browser: Any, made: Made) -> None:
    with opened(browser, made.path) as watched:
        page = watched.page
        assert page.inner_text("h1") == EVIL
        assert page.title().startswith("what is <script>")
        assert "onerror" in page.inner_text("#pictures")
        page.get_by_role("button", name="light and dark").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        page.get_by_role("button", name="random").click()
        assert "random" in page.inner_text("#pruned-title")
        assert page.locator("h1 *").count() == 0
        assert watched.said == []
        asked = [url for url in watched.asked if not url.startswith("data:")]
        assert asked == [made.path.as_uri()]


def test_overlays_lie_on_the_pixels_of_their_tokens(browser: Any, made: Made) -> None:
    """A rectangle's corner on the screen, as a share of the image's, is its box's."""
    with opened(browser, made.path) as watched:
        script = """() => [...document.querySelectorAll('#pictures .frame')].map((frame) => {
            const [image, one] = [frame.querySelector('img'), frame.querySelectorAll('rect')[8]]
                .map((node) => node.getBoundingClientRect());
            return [(one.left - image.left) / image.width, (one.top - image.top) / image.height,
                    one.width / image.width, one.height / image.height]; })"""
        for found, picture in zip(watched.page.evaluate(script), made.page.pictures, strict=True):
            assert picture.boxes[8] is not None
            left, top, right, bottom = picture.boxes[8]
            wide, high = picture.width, picture.height
            box = [left / wide, top / high, (right - left) / wide, (bottom - top) / high]
            assert np.allclose(found, box, atol=0.02), (found, box)


@pytest.mark.slow
def test_steps_follow_the_answer(browser: Any, made: Made) -> None:
    steps = made.page.runs[0].steps
    assert steps is not None
    with opened(browser, made.path) as watched:
        page = watched.page
        page.get_by_role("slider", name="token").fill("0")
        for token in range(len(steps.kept)):
            assert page.inner_text("#token-out") == str(token + 1)
            assert f"KL {steps.kl[token]:.2f}" in page.inner_text("#said")
            lost = page.locator("#at-layers .lost").evaluate_all(
                "(all) => all.map((one) => Number(one.dataset.lost))"
            )
            assert lost == list(steps.lost[token])
            page.keyboard.press("n")
        page.locator('#pruned [data-token="1"]').click()
        assert page.inner_text("#token-out") == "2"
        assert watched.said == []


def test_with_recall_the_overlay_shows_what_a_token_read(
    browser: Any, embedded: Embedded, tmp_path: Path
) -> None:
    pictures = [PICTURES / "a1.png", PICTURES / "a2.png"]
    inputs = embedded.inputs([Image.open(p).convert("RGB") for p in pictures], EVIL)
    recall = plphp.Recall("host", record=True)
    with torch.inference_mode(), plphp.prune(embedded.model, recall=recall):
        cache = plphp.PrunedCache(embedded.model)
        embedded.model.generate(**inputs, cache=cache, do_sample=False, max_new_tokens=6)
    options = {"rounds": 1, "max_new_tokens": 6, "recall": recall}
    page = examine(embedded, inputs, {"plphp": plphp.PLPHP()}, pictures, EVIL, **options)
    write_html(page, tmp_path / "report.html")
    vision = (cache.report.seen.spans[0] > 0).nonzero()[:, 0].tolist()
    with opened(browser, tmp_path / "report.html") as watched:
        shown = watched.page
        shown.get_by_role("slider", name="layer").fill("3")
        shown.get_by_role("slider", name="KV head").fill("1")
        shown.get_by_role("slider", name="token").fill("0")
        assert kept(shown) == expected(cache.report, 3, 1)
        assert "resident after the prompt" in shown.inner_text("#chosen")
        for step, read in enumerate(cache.recalled()[3]):
            shown.keyboard.press("n")
            assert kept(shown) == [vision.index(p) for p in read[0, 1].tolist()]
            assert f"read at token {step + 2}" in shown.inner_text("#chosen")
            fetched = page.runs[0].steps.fetched[step + 1]
            assert f"fetched {fetched} tokens" in shown.inner_text("#said").replace(",", "")
        assert "parked in main memory" in shown.inner_text("#summary")
        assert watched.said == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_nothing_is_wider_than_the_page_and_text_has_enough_contrast(
    browser: Any, made: Made, size: dict[str, int], dark: bool
) -> None:
    with opened(browser, made.path, size, dark) as watched:
        wide, window = watched.page.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= window
        for place in ("body", ".hint", ".meta"):
            assert contrast(watched.page, place) >= 4.5  # WCAG AA
        assert watched.said == []


def contrast(page: Any, place: str) -> float:
    """Of a text's colour and the page's, by the formula of WCAG 2."""
    colors = page.evaluate(
        f"""[getComputedStyle(document.querySelector('{place}')).color,
             getComputedStyle(document.body).backgroundColor]"""
    )
    lights = []
    for color in colors:
        rgb = [int(part) / 255 for part in color[4:-1].split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


@pytest.mark.slow
def test_everything_can_be_reached_without_a_mouse(browser: Any, made: Made) -> None:
    with opened(browser, made.path) as watched:
        page = watched.page
        for name in ("layer", "KV head", "token"):
            assert page.get_by_role("slider", name=name).count() == 1
        unnamed = """() => [...document.querySelectorAll('input, button, img, svg[role=img]')]
            .filter((n) => !(n.labels && n.labels.length) && !n.textContent.trim()
                && !n.getAttribute('aria-label') && !n.alt && !n.querySelector('title')).length"""
        assert page.evaluate(unnamed) == 0
        page.keyboard.press("k")
        before = int(page.inner_text("#layer-out"))
        page.keyboard.press("j")
        assert int(page.inner_text("#layer-out")) == before + 1
        page.emulate_media(media="print")
        assert not page.locator("#layer").is_visible()


@pytest.mark.slow
def test_four_photographs_stay_under_five_megabytes(
    browser: Any, tmp_path: Path, embedded: Embedded
) -> None:
    """Noise is what compresses worst."""
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3200, 3), dtype=np.uint8)
    paths = []
    for number in range(4):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(np.roll(noise, 99 * number, 0)).save(paths[-1], compress_level=1)
    small = [Image.open(path).convert("RGB").resize((224, 224)) for path in paths]
    inputs = embedded.inputs(small, "describe all pictures.")
    with torch.inference_mode(), plphp.prune(embedded.model) as pruning:
        embedded.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert pruning.report is not None
    pruning.report.to_html(tmp_path / "big.html", paths, prompt="describe all pictures.")
    assert (tmp_path / "big.html").stat().st_size < 5e6
    with opened(browser, tmp_path / "big.html") as watched:
        assert watched.page.locator("#pictures img").count() == 4
        assert watched.said == []


def test_the_data_is_json_without_a_way_out(made: Made) -> None:
    text = made.path.read_text()
    data = text.partition('id="data">')[2].partition("</script>")[0]
    assert json.loads(data)["prompt"] == EVIL and "<" not in data
