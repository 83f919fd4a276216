"""`plphp doctor`: says whether a model can be pruned, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Annotated, cast

import typer

from plphp._installed import notes
from plphp.cli import options as o
from plphp.cli.bars import ASCII, IMAGES, TEXT, bars
from plphp.cli.console import stdout, waiting
from plphp.cli.diagnosis import SEQUENCE_METHODS, Diagnosis, diagnose
from plphp.policy import PLPHP

__all__ = ["Diagnosis", "diagnose", "doctor"]

PromptImages = Annotated[
    int,
    typer.Option(min=0, max=o.MOST, help="The number of images in the prompt to examine."),
]
TokensPerImage = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=o.MOST,
        help="The number of vision tokens of an image. The default is the number that the "
        "model's processor or config gives.",
    ),
]
TextTokens = Annotated[
    int, typer.Option(min=0, max=o.MOST, help="The number of text tokens in that prompt.")
]


def doctor(
    model: Annotated[
        str, typer.Argument(help="The model: 'embedded', a local directory, or a hub id.")
    ],
    images: PromptImages = 1,
    tokens_per_image: TokensPerImage = None,
    text_tokens: TextTokens = 64,
    r: o.Rate = None,
    delta_r: o.DeltaR = None,
    dtype: o.Dtype = "auto",
    trust_remote_code: o.TrustRemoteCode = False,
    as_json: o.Json = False,
) -> None:
    """Say whether a model can be pruned, and how many bytes a prompt needs, without its weights."""
    policy = cast(PLPHP, o.chosen_policy("plphp", r=r, delta_r=delta_r))
    from plphp.inputs import load_config
    from plphp.inputs.processors import local_processor, videos_note

    config = load_config(model, trust_remote_code)
    processor, missing = local_processor(model, config, trust_remote_code)
    with waiting(f"building {model} without its weights", quiet=as_json):
        found = diagnose(
            model,
            config,
            policy,
            dtype,
            images,
            tokens_per_image,
            text_tokens,
            trust_remote_code,
            None if tokens_per_image else processor,
        )
    remarks = (missing, videos_note(model, config, processor))
    found = replace(found, notes=(*found.notes, *(note for note in remarks if note), *notes()))
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(found)
    if not found.prunable:
        raise typer.Exit(1)


def _print(d: Diagnosis) -> None:
    answer = "can be pruned" if d.prunable else "cannot be pruned"
    lines = [f"{d.model} ({d.model_type}): {answer}"]
    if not d.prunable:
        lines.append(f"because: {d.reason}")
    if d.reads_images:
        lines += [*_vision(d), *_bytes(d), *_kinds(d), *_stages(d)]
    lines += [f"note: {note}" for note in d.notes]
    console = stdout()
    drawn = _drawn(d) if d.reads_images else []
    if not console.encoding.lower().startswith("utf"):
        drawn = [line.translate(ASCII) for line in drawn]
    for line in (*lines, *drawn):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _vision(d: Diagnosis) -> list[str]:
    """How vision tokens are found and counted, and how many layers are pruned."""
    layers = f"layers: {len(d.prunable_layers)} of {d.layers} are pruned for this prompt"
    if d.attachable_layers != d.prunable_layers:
        layers += f", {len(d.attachable_layers)} for shorter prompts"
    return [
        f"vision tokens: found by {d.found_by}",
        f"vision tokens per image: {d.tokens_per_image:,} ({d.tokens_from})",
        layers,
    ]


def _bytes(d: Diagnosis) -> list[str]:
    """The bytes of the prompt, measured on transformers' own cache."""
    prompt = (
        f"a prompt of {d.images} x {d.tokens_per_image} vision tokens and {d.text_tokens} text "
        "tokens"
    )
    if d.full is None:
        return [f"{prompt}: the bytes are unknown: {d.unmeasured}"]
    lines = [
        f"bytes per vision token: {d.token_bytes:,} in all layers, {d.prunable_bytes:,} in the "
        "layers that are pruned",
        f"{prompt}: {d.full:,} bytes with the full cache",
    ]
    if d.other_bytes:
        lines.append(f"other state in the cache: {d.other_bytes:,} bytes")
    if d.prunable and d.pruned is not None:
        low, middle, high = d.pruned
        lines.append(
            f"with the pruned cache: {low:,} bytes if all layers are vision-indifferent, "
            f"{middle:,} if all are vision-balanced, {high:,} if all are vision-attentive"
        )
    return lines


def _drawn(d: Diagnosis) -> list[str]:
    """A bar of text and images for the full cache, and for the pruned one by class of layers."""
    if d.full is None or d.token_bytes is None or not d.images:
        return []
    caches = {"full": d.full}
    if d.prunable and d.prunable_layers and d.pruned is not None:
        classes = ("indifferent", "balanced", "attentive")
        caches |= dict(zip(classes, d.pruned, strict=True))
    text = d.token_bytes * d.text_tokens
    parts = {name: (min(text, size), max(size - text, 0)) for name, size in caches.items()}
    return ["", f"bytes of the prompt: {TEXT} text, {IMAGES} images", *bars(parts, d.images)]


def _stages(d: Diagnosis) -> list[str]:
    """Lines about the methods that drop vision tokens before the cache does."""
    if not d.prunable:
        return []
    fit = ", ".join(name for name in SEQUENCE_METHODS if name not in d.refused) or "none"
    by_reason: dict[str, list[str]] = {}
    for name, why in d.refused.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"methods that may drop vision tokens before the cache does: {fit}",
        *(f"not {', '.join(names)}: {why}" for why, names in by_reason.items()),
    ]


def _kinds(d: Diagnosis) -> list[str]:
    """Lines about the layers that do not attend to all earlier tokens."""
    odd = sorted({w for w in d.windows if isinstance(w, str)})
    windows = sorted({w for w in d.windows if isinstance(w, int)})
    lines = []
    if windows:
        lines.append(
            f"sliding windows of {', '.join(map(str, windows))} tokens: these layers are pruned if "
            "the window covers the whole prompt"
        )
    if odd:
        lines.append(f"layers that are never pruned: those of kind {', '.join(odd)}")
    return lines
