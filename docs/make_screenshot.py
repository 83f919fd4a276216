"""Make the README's screenshot of the inspector: `make screenshot`, which needs Chromium."""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

import plphp
import plphp.demo
from plphp.demo.model import load
from plphp.inspector import examine, write_html

PICTURES = [Path(plphp.demo.__file__).parent / "pictures" / f"a{i}.png" for i in (1, 2, 3)]
QUESTION = "what color is the E in picture 2?"
POLICIES = ("plphp", "random", "novelty")
SIZE = {"width": 1180, "height": 1345}


def page(path: Path) -> None:
    """Write the inspector's page about three bundled pictures."""
    embedded = load()
    pictures = [Image.open(picture).convert("RGB") for picture in PICTURES]
    inputs = embedded.inputs(pictures, QUESTION)
    policies = {name: plphp.policy(name) for name in POLICIES}
    made = examine(embedded, inputs, policies, PICTURES, QUESTION, model="embedded", oracle=True)
    write_html(made, path)


def shoot(path: Path) -> bytes:
    """A PNG of the top of the page, with one head of a layer selected."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page(viewport=SIZE, device_scale_factor=1.3)
        tab.goto(path.as_uri())
        tab.get_by_role("slider", name="layer").fill("2")
        tab.get_by_role("slider", name="KV head").fill("1")
        tab.evaluate("document.activeElement.blur()")
        picture = tab.screenshot()
        browser.close()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "figures" / "inspector.png"
    )
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "report.html"
        page(made)
        picture = Image.open(io.BytesIO(shoot(made))).convert("RGB")
    # With a palette the file has half the bytes.
    picture.quantize(256, kmeans=1).save(out, optimize=True)


if __name__ == "__main__":
    main()
