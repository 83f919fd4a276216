"""`plphp inspect`: one page that shows what was kept, where, and what it cost."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from plphp.cli import options as o
from plphp.cli.console import stderr, stdout
from plphp.cli.generate import check_files
from plphp.errors import InputError
from plphp.policy import Policy

PAGE = Path("report.html")


def inspect(
    image: Annotated[
        list[str] | None,
        typer.Option(help="An image file; may be repeated. Without any: a bundled example."),
    ] = None,
    video: Annotated[list[str] | None, typer.Option(help="A video file; may be repeated.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The question about them.")] = None,
    model: o.Model = "embedded",
    out: Annotated[
        Path | None, typer.Option(help="Where the page goes. [report.html, none with --json]")
    ] = None,
    policy: o.PolicyName = "plphp",
    r: o.Rate = None,
    delta_r: o.DeltaR = None,
    alpha: o.Alpha = None,
    beta: o.Beta = None,
    budget: o.Budget = None,
    gqa: o.Gqa = None,
    min_tokens: o.MinTokens = None,
    round_to: o.RoundTo = None,
    recall: o.RecallHome = None,
    recall_budget: o.RecallBudget = None,
    policies: Annotated[
        str | None, typer.Option(help="Several methods on one page, such as plphp,random.")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Also ask the full model at every token.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="How often each answer is timed.")] = 3,
    dtype: o.Dtype = "auto",
    device: o.Device = "cpu",
    attn: o.Attention = None,
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Write a page of what was kept, where, and what it cost: one file, no network needed."""
    settings = {
        "r": r,
        "delta_r": delta_r,
        "alpha": alpha,
        "beta": beta,
        "budget": budget,
        "gqa": gqa,
        "min_tokens": min_tokens,
        "round_to": round_to,
    }
    chosen = _chosen(policy, policies, settings)
    parked = o.chosen_recall(recall, recall_budget)
    images, videos = image or [], video or []
    if not images and not videos:
        images, question = example()
        prompt = question if prompt is None else prompt
    if prompt is None or not prompt.strip():
        raise InputError("give --prompt TEXT, the question about the images")
    check_files(images, videos)
    where = PAGE if out is None and not as_json else out
    if where is not None and not where.resolve().parent.is_dir():
        raise InputError(f"--out {where}: no such directory")
    from plphp.inputs import load, make_inputs
    from plphp.report import examine, shown_videos, write_html

    loaded = load(model, dtype, device, attn, trust_remote_code)
    inputs = make_inputs(loaded, images, prompt, videos)
    media: list[Any] = [*images, *shown_videos(loaded.model.config, inputs)]
    with stderr().status("reading the prompt") as status:
        page = examine(
            loaded,
            inputs,
            chosen,
            media,
            prompt,
            model=model,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            oracle=oracle,
            recall=parked,
            advance=status.update,
        )
    if where is not None:
        write_html(page, where)
    if as_json:
        print(json.dumps(page.to_json()))
        return
    for run in page.runs:
        same = "the full model's answer" if run.differs is None else f"differs at {run.differs + 1}"
        held = "kept" if run.recall is None else "in full on the device"
        stdout().print(f"{run.policy}: {run.retention:.0%} of the vision K/V {held}, {same}")
    stdout().print(f"open {where} in a browser", soft_wrap=True)


def example() -> tuple[list[str], str]:
    """Pictures and question of the demo's first example."""
    root = Path(str(files("plphp.demo")))
    first = json.loads((root / "questions.json").read_text())[0]
    return [str(root / "pictures" / name) for name in first["images"]], first["question"]


def _chosen(policy: str, policies: str | None, settings: dict[str, Any]) -> dict[str, Policy]:
    """Methods by name. Several share no options but the budget."""
    if policies is None:
        return {policy: o.chosen_policy(policy, **settings)}
    names = [name.strip() for name in policies.split(",") if name.strip()]
    given = [name for name, value in settings.items() if value is not None and name != "budget"]
    if not names:
        raise InputError("--policies is empty: name methods, such as plphp,random")
    if given:
        option = given[0].replace("_", "-")
        raise InputError(f"--{option} belongs to --policy; --policies takes only --budget")
    return {name: o.chosen_policy(name, budget=settings["budget"]) for name in names}
