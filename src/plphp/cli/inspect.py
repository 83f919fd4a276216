"""`plphp inspect`: writes an HTML page that shows which tokens were kept and what that cost."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plphp.cli import flags
from plphp.cli import options as o
from plphp.cli.bits import Bits
from plphp.cli.console import say, shown, stdout, waiting
from plphp.cli.generate import check_files
from plphp.errors import InputError
from plphp.policy import Policy

if TYPE_CHECKING:
    from plphp.inspector import Page

PAGE = Path("report.html")


def inspect(
    *,
    image: flags.Image = None,
    video: flags.Video = None,
    prompt: flags.PagePrompt = None,
    out: flags.PageOut = None,
    method: o.Method,
    bits: Bits,
    policies: flags.Policies = None,
    oracle: flags.Oracle = False,
    max_new_tokens: o.MaxNewTokens = 128,
    rounds: flags.Rounds = 3,
    source: o.Source,
    as_json: o.Json = False,
) -> None:
    """Write one HTML file that shows which tokens were kept. Without images, show an example."""
    chosen, parked = _chosen(method, policies), method.parked()
    images, videos = image or [], video or []
    bundled = not images and not videos
    if bundled:
        images, prompt = example()
    if prompt is None or not prompt.strip():
        raise InputError("give --prompt TEXT, the question about the images")
    check_files(images, videos, source.model)
    where = _place(out, as_json)
    from plphp.inputs import make_inputs
    from plphp.inspector import examine, shown_videos

    loaded = source.load()
    if bundled and not as_json:
        names = ", ".join(Path(path).name for path in images)
        say(f"no --image: the page shows plphp's own {names} and the question {prompt!r}")
    inputs = make_inputs(loaded, images, prompt, videos)
    media: list[Any] = [*images, *shown_videos(loaded.model.config, inputs)]
    with waiting("reading the prompt", quiet=as_json) as show:
        page = examine(
            loaded,
            inputs,
            chosen,
            media,
            prompt,
            model=source.model,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            oracle=oracle,
            recall=parked,
            **vars(bits),
            advance=show,
        )
    _present(page, where, as_json)


def _place(out: Path | None, as_json: bool) -> Path | None:
    """Where the page is written, None for nowhere. Raises InputError if that cannot be."""
    where = PAGE if out is None and not as_json else out
    if where is not None:
        _check_out(where)
    return where


def _present(page: Page, where: Path | None, as_json: bool) -> None:
    """Write the page, and print one line per method, or the data of the page as JSON."""
    from plphp.report import StageReport

    if where is not None:
        from plphp.inspector import write_html

        write_html(page, where)
    if as_json:
        print(json.dumps(page.to_json()))
        return
    for run in page.runs:
        same = (
            "the answer is that of the full model"
            if run.differs is None
            else f"the answer differs from that of the full model at token {run.differs + 1}"
        )
        told = f"{run.policy}: {run.retention:.0%} of the vision K/V {run.held}, {same}"
        stdout().print(told, soft_wrap=True)
        for stage in run.stages:
            stdout().print(f"  {StageReport(**stage)}", soft_wrap=True)
    stdout().print(shown(f"open {where} in a browser"), soft_wrap=True)


def _check_out(where: Path) -> None:
    """Raise InputError if no page can be written there, or if another file would be lost."""
    if not where.resolve().parent.is_dir():
        raise InputError(f"--out {where}: no such directory")
    if where.exists() and not _is_page(where):
        raise InputError(f"{where} exists and is not a page of plphp: give another --out")


def _is_page(path: Path) -> bool:
    """Whether a file is an earlier page, which a new page may replace."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>" and b"plphp inspect" in file.read(20_000)


def example() -> tuple[list[str], str]:
    """The image files and the question of the demo's first example."""
    root = Path(str(files("plphp.demo")))
    first = json.loads((root / "questions.json").read_text(encoding="utf-8"))[0]
    return [str(root / "pictures" / name) for name in first["images"]], first["question"]


def _chosen(method: o.Method, policies: str | None) -> dict[str, Policy]:
    """The policies by name. Several policies can have only the budget in common."""
    if policies is None:
        return {method.policy: method.chosen()}
    names = [name.strip() for name in policies.split(",") if name.strip()]
    if not names:
        raise InputError("--policies is empty: give names of methods, such as plphp,random")
    for name in method.settings:
        if name != "budget":
            option = name.replace("_", "-")
            raise InputError(
                f"--{option} can only be used with --policy; --policies takes only --budget"
            )
    return {name: o.chosen_policy(name, budget=method.budget) for name in names}
