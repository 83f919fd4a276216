"""What can be said of a model without its weights: its layers, its vision tokens, its bytes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plphp.errors import (
    InputError,
    PlphpError,
    UnsupportedModelError,
    UnsupportedTransformersError,
)
from plphp.policy import PLPHP, steps

if TYPE_CHECKING:
    from plphp.hf.footprint import Footprint

SECONDS = 120.0  # for building and reading a model without weights; real ones take a few
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


@dataclass(frozen=True)
class Diagnosis:
    """What can be said of a model from its config and its code.

    prunable_layers: those that this prompt is pruned in; attachable_layers: those that some prompt
        is: a layer whose attention window is shorter than a prompt is left alone
    token_bytes: keys and values over tokens, of this prompt in transformers' own cache;
        prunable_bytes: those of one token in layers that this prompt is pruned in
    tokens_from: what says how many tokens an image takes
    full, pruned: bytes of keys and values of the prompt that was asked about; pruned runs from
        every layer indifferent to every layer attentive
    other_bytes: what the cache holds beside keys and values, such as states of linear layers
    unmeasured: why there are no bytes, which are None then; empty where there are
    notes: what a user should know of this prompt
    """

    model: str
    model_type: str
    prunable: bool
    reason: str
    found_by: str
    layers: int
    attachable_layers: tuple[int, ...]
    prunable_layers: tuple[int, ...]
    windows: tuple[int | str | None, ...]
    token_bytes: int | None
    prunable_bytes: int | None
    images: int
    tokens_per_image: int
    tokens_from: str
    text_tokens: int
    full: int | None
    pruned: tuple[int, int, int] | None
    other_bytes: int | None
    unmeasured: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examined:
    """A model on the meta device.

    attachable, reason: the layers that `prune` attaches to, or none and why
    windows: of every cached layer, as `compat.layer_windows` returns them
    bytes: of the prompt in every layer, None where `unmeasured` says why
    """

    attachable: tuple[int, ...]
    reason: str
    windows: tuple[int | str | None, ...]
    bytes: tuple[Footprint, ...] | None
    unmeasured: str

    def pruned_at(self, length: int) -> tuple[int, ...]:
        """The layers that a prompt of so many tokens is pruned in: their window covers it."""
        from plphp.hf import compat

        return tuple(i for i in self.attachable if compat.covers(self.windows[i], length))


def diagnose(
    name: str,
    config: Any,
    policy: PLPHP,
    dtype: str,
    images: int,
    tokens_per_image: int | None,
    text_tokens: int,
    trust: bool = False,
    processor: Any = None,
) -> Diagnosis:
    """Attach to the model on the meta device, and fill transformers' own cache there.

    The same checks as for a real model, without memory. tokens_per_image: None asks the processor
    and the config. Raises InputError for a config that no model can be built of.
    """
    from plphp.models import image_tokens

    each, source = tokens_per_image, "as given"
    if each is None:
        each, source = image_tokens(config, processor)
    length = images * each + text_tokens
    seen = _examined(name, config, dtype, length, trust)
    here = seen.pruned_at(length)
    return Diagnosis(
        model=name,
        model_type=config.model_type,
        prunable=not seen.reason,
        reason=seen.reason,
        found_by=_found_by(config),
        layers=len(seen.windows),
        attachable_layers=seen.attachable,
        prunable_layers=here,
        windows=seen.windows,
        images=images,
        tokens_per_image=each,
        tokens_from=source,
        text_tokens=text_tokens,
        unmeasured=seen.unmeasured,
        notes=_notes(config, seen, length),
        **_taken(seen.bytes, here, policy, images, each, text_tokens),
    )


def _taken(
    layers: tuple[Footprint, ...] | None,
    here: tuple[int, ...],
    policy: PLPHP,
    images: int,
    each: int,
    text_tokens: int,
) -> dict[str, Any]:
    """The fields of a diagnosis that are bytes, None where nothing could be measured."""
    if layers is None:
        return dict.fromkeys(("token_bytes", "prunable_bytes", "full", "pruned", "other_bytes"))
    full = sum(layer.kv for layer in layers)
    prunable = sum(layers[i].token for i in here)
    alone = full - sum(layers[i].kv for i in here)
    rates = (policy.r - policy.delta_r, policy.r, policy.r + policy.delta_r)
    return {
        "token_bytes": full // max(images * each + text_tokens, 1),
        "prunable_bytes": prunable,
        "full": full,
        "pruned": tuple(
            alone + prunable * (text_tokens + images * _kept(each, rate)) for rate in rates
        ),
        "other_bytes": sum(layer.other for layer in layers),
    }


def _kept(tokens: int, rate: float) -> int:
    """Tokens of an image that a rate keeps."""
    import torch

    rates = torch.tensor([rate], dtype=torch.float64)
    return int(steps.share(rates, torch.tensor([[tokens]])))


def _examined(name: str, config: Any, dtype: str, length: int, trust: bool) -> Examined:
    """Build the model and look at it; what transformers raises becomes one line."""
    from plphp.hf.footprint import bounded

    try:
        with bounded(SECONDS, f"reading {name}"):
            return _examine(copy.deepcopy(config), dtype, length, trust)
    except (PlphpError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"no model can be made of the config of {name} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check its config.json"
        ) from error


def _examine(config: Any, dtype: str, length: int, trust: bool) -> Examined:
    from plphp.hf import compat, prune
    from plphp.hf.footprint import footprint
    from plphp.inputs.shell import shell

    text = config.get_text_config(decoder=True)
    windows: tuple[int | str | None, ...] = ()
    try:
        model = shell(config, trust, _kind(text, dtype))
    except UnsupportedModelError as error:
        return Examined((), str(error), windows, None, "there is no model to measure")
    attachable: tuple[int, ...] = ()
    reason = ""
    windows = tuple(compat.layer_windows(text))
    try:
        with prune(model) as pruning:
            attachable = pruning.layers
    except UnsupportedTransformersError:
        raise  # it says nothing of the model
    except PlphpError as error:
        reason = str(error)
    try:
        return Examined(attachable, reason, windows, footprint(model, length), "")
    except UnsupportedModelError as error:
        return Examined(attachable, reason, windows, None, str(error))


def _kind(text: Any, dtype: str) -> Any:
    """The number format of the weights, bfloat16 where the config does not say."""
    import torch

    kind = getattr(text, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    return kind if isinstance(kind, torch.dtype) else torch.bfloat16


def _notes(config: Any, seen: Examined, length: int) -> tuple[str, ...]:
    """What is out of the ordinary about a prompt of so many tokens."""
    notes = []
    text = config.get_text_config(decoder=True)
    most = next((n for key in POSITIONS if isinstance(n := getattr(text, key, None), int)), 0)
    if 0 < most < length:
        notes.append(
            f"the prompt has {length:,} tokens, and the model's config allows {most:,} positions: "
            "use fewer images or less text"
        )
    if seen.attachable and not seen.pruned_at(length):
        notes.append("no layer's attention window covers this prompt: nothing of it is pruned")
    return tuple(notes)


def _found_by(config: Any) -> str:
    from plphp.models import FAMILIES, describes_vision

    if not describes_vision(config):
        return "mm_token_type_ids of the processor, or a vision_mask of your own"
    known = "its entry in plphp.models" if config.model_type in FAMILIES else "no entry, so by runs"
    return f"the image and video token ids of the config; images told apart by {known}"
