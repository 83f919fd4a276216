"""A page in a real Chromium, loaded from its file with the network off."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
PATIENCE = 120_000  # milliseconds; a machine may be busy
WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Watched:
    """A page, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)


@contextmanager
def launched() -> Iterator[Any]:
    """A Chromium. Skips where playwright or Chromium is missing: `apt-get install chromium`."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as p:
        # Root may not use Chromium's sandbox, and tests often run as root.
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        browser = p.chromium.launch(**options, timeout=PATIENCE)
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, path: Path, size: dict[str, int] = WIDE, dark: bool = False
) -> Iterator[Watched]:
    scheme = "dark" if dark else "light"
    context = browser.new_context(offline=True, viewport=size, color_scheme=scheme)
    context.set_default_timeout(PATIENCE)
    watched = Watched(context.new_page())
    watched.page.on("console", lambda message: watched.said.append(message.text))
    watched.page.on("pageerror", lambda error: watched.said.append(str(error)))
    watched.page.on("dialog", lambda dialog: watched.said.append(dialog.message))
    watched.page.on("request", lambda request: watched.asked.append(request.url))
    watched.page.goto(path.as_uri())
    yield watched
    context.close()


def kept(page: Any) -> list[int]:
    """Vision tokens that the overlays show as kept, counted from 0."""
    script = """() => [...document.querySelectorAll('#pictures rect')]
        .filter((rect) => Number(rect.dataset.kept) > 0)
        .flatMap((rect) => rect.dataset.tokens.split(' ').map(Number)).sort((a, b) => a - b)"""
    found: list[int] = page.evaluate(script)
    return found


def shares(page: Any) -> dict[int, float]:
    """Vision token -> share of heads that keep it, as the overlays show it."""
    script = """() => Object.fromEntries([...document.querySelectorAll('#pictures rect')]
        .flatMap((r) => r.dataset.tokens.split(' ').map((t) => [t, Number(r.dataset.kept)])))"""
    return {int(token): share for token, share in page.evaluate(script).items()}
