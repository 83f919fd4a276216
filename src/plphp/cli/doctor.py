"""`plphp doctor`: whether and how a model can be pruned, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any, cast

import typer

from plphp.cli import options as o
from plphp.cli.console import stdout
from plphp.cli.diagnosis import Diagnosis, diagnose
from plphp.policy import PLPHP

__all__ = ["Diagnosis", "diagnose", "doctor"]


def doctor(
    model: Annotated[str, typer.Argument(help="'embedded', a local directory, or a hub id.")],
    images: Annotated[int, typer.Option(min=0, help="Images of the prompt to estimate.")] = 1,
    tokens_per_image: Annotated[
        int | None,
        typer.Option(min=1, help="Vision tokens that an image takes. [what the model says]"),
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=0, help="Text tokens of that prompt.")] = 64,
    r: o.Rate = None,
    delta_r: o.DeltaR = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Say whether a model can be pruned, and what a prompt would take, from its config alone."""
    policy = cast(PLPHP, o.chosen_policy("plphp", r=r, delta_r=delta_r))
    from plphp.inputs import load_config

    config = load_config(model, trust_remote_code)
    processor = None if tokens_per_image else _processor(model, trust_remote_code)
    found = diagnose(
        model,
        config,
        policy,
        dtype,
        images,
        tokens_per_image,
        text_tokens,
        trust_remote_code,
        processor,
    )
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(found)
    if not found.prunable:
        raise typer.Exit(1)


def _processor(name: str, trust: bool) -> Any:
    """The model's processor as far as its files lie here; None where they do not."""
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(name, trust_remote_code=trust, local_files_only=True)
    except Exception:
        return None  # the config answers instead


def _print(d: Diagnosis) -> None:
    lines = [f"{d.model} ({d.model_type}): " + ("can be pruned" if d.prunable else "cannot")]
    if not d.prunable:
        lines.append(f"because: {d.reason}")
    lines.append(f"vision tokens: found by {d.found_by}")
    lines.append(f"vision tokens an image: {d.tokens_per_image:,} ({d.tokens_from})")
    lines.append(f"layers: {len(d.prunable_layers)} of {d.layers} can be pruned at this prompt")
    if d.attachable_layers != d.prunable_layers:
        lines[-1] += f", {len(d.attachable_layers)} at shorter ones"
    lines += [*_bytes(d), *_kinds(d), *(f"note: {note}" for note in d.notes)]
    console = stdout()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _bytes(d: Diagnosis) -> list[str]:
    """What the prompt takes, measured on transformers' own cache."""
    prompt = (
        f"a prompt of {d.images} x {d.tokens_per_image} vision tokens and {d.text_tokens} text "
        "tokens"
    )
    if d.full is None:
        return [f"{prompt}: bytes unknown, {d.unmeasured}"]
    lines = [
        f"bytes a vision token: {d.token_bytes:,} in all layers, {d.prunable_bytes:,} prunable",
        f"{prompt}: {d.full:,} bytes full",
    ]
    if d.other_bytes:
        lines.append(f"beside keys and values the cache holds {d.other_bytes:,} bytes")
    if d.prunable and d.pruned is not None:
        low, middle, high = d.pruned
        lines.append(
            f"pruned: {middle:,} bytes if every layer is balanced, between {low:,} (all "
            f"indifferent) and {high:,} (all attentive)"
        )
    return lines


def _kinds(d: Diagnosis) -> list[str]:
    """The layers that do not attend to everything before them."""
    odd = sorted({w for w in d.windows if isinstance(w, str)})
    windows = sorted({w for w in d.windows if isinstance(w, int)})
    lines = []
    if windows:
        lines.append(f"sliding windows of {windows}: pruned while they cover the whole prompt")
    if odd:
        lines.append(f"left alone: layers of kind {', '.join(odd)}")
    return lines
