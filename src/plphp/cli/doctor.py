"""`plphp doctor`: whether and how a model can be pruned, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any, cast

import typer

from plphp.cli import options as o
from plphp.cli.console import stdout
from plphp.errors import PlphpError, UnsupportedTransformersError
from plphp.policy import PLPHP, steps


@dataclass(frozen=True)
class Diagnosis:
    """What can be said of a model from its config and its code.

    token_bytes: keys and values of one token over all layers, as many bytes as an unpruned cache
        spends on it; prunable_bytes: the part of it in layers that can be pruned
    full, pruned: bytes of the prompt that was asked about; pruned runs from every layer
        indifferent to every layer attentive
    """

    model: str
    model_type: str
    prunable: bool
    reason: str
    found_by: str
    layers: int
    prunable_layers: tuple[int, ...]
    windows: tuple[int | str | None, ...]
    token_bytes: int
    prunable_bytes: int
    images: int
    tokens_per_image: int
    text_tokens: int
    full: int
    pruned: tuple[int, int, int]


def doctor(
    model: Annotated[str, typer.Argument(help="'embedded', a local directory, or a hub id.")],
    images: Annotated[int, typer.Option(min=0, help="Images of the prompt to estimate.")] = 1,
    tokens_per_image: Annotated[
        int, typer.Option(min=1, help="Vision tokens that an image takes.")
    ] = 1024,
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
    found = diagnose(
        model,
        config,
        policy,
        dtype,
        images,
        tokens_per_image,
        text_tokens,
        trust_remote_code,
    )
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(found)
    if not found.prunable:
        raise typer.Exit(1)


def diagnose(
    name: str,
    config: Any,
    policy: PLPHP,
    dtype: str,
    images: int,
    tokens_per_image: int,
    text_tokens: int,
    trust: bool = False,
) -> Diagnosis:
    """Attach to the model on the meta device: the same checks as a real one, no memory."""
    from plphp.hf import compat

    layers, reason = _layers(config, trust)
    text = config.get_text_config(decoder=True)
    windows = compat.layer_windows(text)
    length = images * tokens_per_image + text_tokens
    per_layer = _layer_bytes(text, dtype)
    # A window that is shorter than the prompt leaves its layer alone.
    pruned = [i for i in layers if compat.covers(windows[i], length)]
    alone = len(windows) - len(pruned)

    def taken(rate: float) -> int:
        kept = text_tokens + images * _kept(tokens_per_image, rate)
        return per_layer * (alone * length + len(pruned) * kept)

    return Diagnosis(
        model=name,
        model_type=config.model_type,
        prunable=not reason,
        reason=reason,
        found_by=_found_by(config),
        layers=len(windows),
        prunable_layers=layers,
        windows=tuple(windows),
        token_bytes=per_layer * len(windows),
        prunable_bytes=per_layer * len(pruned),
        images=images,
        tokens_per_image=tokens_per_image,
        text_tokens=text_tokens,
        full=per_layer * len(windows) * length,
        pruned=(
            taken(policy.r - policy.delta_r),
            taken(policy.r),
            taken(policy.r + policy.delta_r),
        ),
    )


def _layers(config: Any, trust: bool) -> tuple[tuple[int, ...], str]:
    """The layers that can be pruned, or none and the reason."""
    from plphp.hf import prune

    try:
        with prune(_shell(config, trust)) as pruning:
            return pruning.layers, ""
    except UnsupportedTransformersError:
        raise  # it says nothing of the model
    except PlphpError as error:
        return (), str(error)


def _kept(tokens: int, rate: float) -> int:
    """Tokens of an image that a rate keeps."""
    import torch

    rates = torch.tensor([rate], dtype=torch.float64)
    return int(steps.share(rates, torch.tensor([[tokens]])))


def _shell(config: Any, trust: bool) -> Any:
    """The model without weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with torch.device("meta"):
                return auto.from_config(config, trust_remote_code=trust)
    from plphp.errors import UnsupportedModelError

    raise UnsupportedModelError(
        f"{config.model_type} is not a vision-language model that transformers can generate with"
    )


def _layer_bytes(text: Any, dtype: str) -> int:
    """Bytes of one token's key and value in one layer."""
    import torch

    from plphp.hf import compat

    kind = getattr(text, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    kind = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * int(heads) * compat.head_dim(text) * kind.itemsize


def _found_by(config: Any) -> str:
    from plphp.models import FAMILIES, describes_vision

    if not describes_vision(config):
        return "mm_token_type_ids of the processor, or a vision_mask of your own"
    known = "its entry in plphp.models" if config.model_type in FAMILIES else "no entry, so by runs"
    return f"the image and video token ids of the config; images told apart by {known}"


def _print(d: Diagnosis) -> None:
    lines = [f"{d.model} ({d.model_type}): " + ("can be pruned" if d.prunable else "cannot")]
    if not d.prunable:
        lines.append(f"because: {d.reason}")
    lines += [
        f"vision tokens: found by {d.found_by}",
        f"layers: {len(d.prunable_layers)} of {d.layers} can be pruned",
        f"bytes a vision token: {d.token_bytes:,} in all layers, {d.prunable_bytes:,} prunable",
        f"a prompt of {d.images} x {d.tokens_per_image} vision tokens and {d.text_tokens} text "
        f"tokens: {d.full:,} bytes full",
    ]
    if d.prunable:
        low, middle, high = d.pruned
        lines.append(
            f"pruned: {middle:,} bytes if every layer is balanced, between {low:,} (all "
            f"indifferent) and {high:,} (all attentive)"
        )
    odd = sorted({w for w in d.windows if isinstance(w, str)})
    windows = sorted({w for w in d.windows if isinstance(w, int)})
    if windows:
        lines.append(f"sliding windows of {windows}: pruned while they cover the whole prompt")
    if odd:
        lines.append(f"left alone: layers of kind {', '.join(odd)}")
    console = stdout()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
