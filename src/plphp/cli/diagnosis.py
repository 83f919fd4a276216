"""What plphp can say about a model without its weights: its layers, vision tokens and bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from plphp.cli.options import MOST
from plphp.errors import (
    InputError,
    PlphpError,
    UnsupportedModelError,
    UnsupportedTransformersError,
)
from plphp.policy import PLPHP, POLICIES, SequencePolicy, steps

if TYPE_CHECKING:
    from plphp.hf.footprint import Footprint

Made = TypeVar("Made")
SECONDS = 120.0  # the time limit for building a model without weights; real models take a few
POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")

SEQUENCE_METHODS = tuple(n for n, one in POLICIES.items() if issubclass(one, SequencePolicy))


@dataclass(frozen=True)
class Diagnosis:
    """What plphp can say about a model from its config and its code, for one prompt.

    The prompt has `images` images of `tokens_per_image` vision tokens, and `text_tokens` text
    tokens. A layer whose attention window is shorter than the prompt is not pruned.

    reason: why the model cannot be pruned; empty if it can
    reads_images: False for a model of text alone, of which the fields about images say nothing
    attachable_layers: indices of the layers that can be pruned for some prompt
    prunable_layers: indices of the layers that are pruned for this prompt
    windows: for each cached layer, as `compat.layer_windows` returns them
    token_bytes: bytes of the keys and values of a token, averaged over the prompt, in
        transformers' own cache
    prunable_bytes: the same in the layers that are pruned for this prompt
    tokens_from: the source of `tokens_per_image`, in words
    full: bytes of the keys and values of the prompt
    pruned: the same after pruning, if all layers are vision-indifferent, vision-balanced, or
        vision-attentive
    other_bytes: bytes in the cache that are not keys and values, such as states of linear layers
    unmeasured: the reason why all bytes are None; empty if they were measured
    refused: sequence methods that cannot be used with this model, and why
    notes: sentences that a user should read about this prompt
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
    reads_images: bool = True
    refused: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Examined:
    """What was found out about a model on the meta device.

    attachable: indices of the layers that `prune` attaches to
    reason: why it attaches to none; empty otherwise
    windows: for each cached layer, as `compat.layer_windows` returns them
    bytes: the bytes of the prompt in each layer, or None
    unmeasured: why `bytes` is None; empty otherwise
    refused: sequence methods to which `prune` does not attach, and why; `look_at` tries none
    """

    attachable: tuple[int, ...]
    reason: str
    windows: tuple[int | str | None, ...]
    bytes: tuple[Footprint, ...] | None
    unmeasured: str
    refused: dict[str, str] = field(default_factory=dict)

    def pruned_at(self, length: int) -> tuple[int, ...]:
        """Indices of the layers that are pruned for a prompt of `length` tokens.

        The attention window of these layers covers the prompt.
        """
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
    """Attach to the model on torch's meta device, and fill transformers' own cache there.

    The checks are those of a real model, but the tensors take no memory. If tokens_per_image is
    None, the processor or the config gives it. Raises InputError if no model can be built from the
    config, and for a prompt of more tokens than a tensor can hold.
    """
    from plphp.inputs.formats import number_format
    from plphp.inputs.shell import is_text_alone
    from plphp.models import image_tokens

    each, source = tokens_per_image, "given by --tokens-per-image"
    if each is None:
        each, source = image_tokens(config, processor)
    length = _length(images, each, text_tokens)
    kind, unknown = number_format(name, config, dtype)
    reads_images = not is_text_alone(config)
    seen = examined(name, config, kind, length, trust)
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
        reads_images=reads_images,
        refused=seen.refused,
        notes=(*_notes(config, seen, length), *([unknown] if unknown and reads_images else [])),
        **_taken(seen.bytes, here, policy, images, each, text_tokens),
    )


def _length(images: int, each: int, text_tokens: int) -> int:
    """The number of tokens of a prompt. Raises InputError for more than a tensor can hold."""
    if (length := images * each + text_tokens) > MOST:
        raise InputError(
            f"--images {images} of {each} vision tokens and --text-tokens {text_tokens} are a "
            f"prompt of {length} tokens: give at most {MOST} in all"
        )
    return length


def _taken(
    layers: tuple[Footprint, ...] | None,
    here: tuple[int, ...],
    policy: PLPHP,
    images: int,
    each: int,
    text_tokens: int,
) -> dict[str, Any]:
    """The fields of a diagnosis that are bytes. They are None if nothing could be measured."""
    if layers is None:
        return dict.fromkeys(("token_bytes", "prunable_bytes", "full", "pruned", "other_bytes"))
    full = sum(layer.kv for layer in layers)
    prunable = sum(layers[i].token for i in here)
    alone = full - sum(layers[i].kv for i in here)
    length = max(images * each + text_tokens, 1)
    rates = (policy.r - policy.delta_r, policy.r, policy.r + policy.delta_r)
    return {
        "token_bytes": full // length,
        "prunable_bytes": (full - alone) // length,
        "full": full,
        "pruned": tuple(
            alone + prunable * (text_tokens + images * _kept(each, rate)) for rate in rates
        ),
        "other_bytes": sum(layer.other for layer in layers),
    }


def _kept(tokens: int, rate: float) -> int:
    """The number of tokens of an image that a layer keeps at this rate."""
    import torch

    rates = torch.tensor([rate], dtype=torch.float64)
    return int(steps.share(rates, torch.tensor([[tokens]])))


def examined(name: str, config: Any, kind: Any, length: int, trust: bool) -> Examined:
    """Build the model without weights and examine it. kind: the dtype of the weights

    Raises InputError if no model can be built from the config.
    """
    return on_meta(name, lambda: _examine(copy.deepcopy(config), kind, length, trust))


def on_meta(name: str, work: Callable[[], Made]) -> Made:
    """The result of work on the meta device, for a limited time.

    name: of the model. An error of transformers becomes an InputError.
    """
    from plphp.hf.footprint import bounded

    try:
        with bounded(SECONDS, f"reading {name}"):
            return work()
    except (PlphpError, MemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"no model can be built from the config of {name} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check its config.json"
        ) from error


def _examine(config: Any, kind: Any, length: int, trust: bool) -> Examined:
    from plphp.inputs.shell import TEXT_ALONE, is_text_alone, shell

    try:
        model = shell(config, trust, kind)
    except UnsupportedModelError as error:
        return Examined((), str(error), (), None, "the model cannot be built")
    seen = look_at(model, length)
    if is_text_alone(config):
        return replace(seen, attachable=(), reason=TEXT_ALONE.format(config.model_type))
    return replace(seen, refused=_refused(model)) if seen.attachable else seen


def look_at(model: Any, length: int) -> Examined:
    """Examine a model on the meta device, for a prompt of `length` tokens."""
    from plphp.hf import compat, prune
    from plphp.hf.footprint import footprint

    attachable: tuple[int, ...] = ()
    reason = ""
    windows = tuple(compat.layer_windows(compat.text_config(model)))
    try:
        with prune(model) as pruning:
            attachable = pruning.layers
    except UnsupportedTransformersError:
        raise  # the error is about transformers, not about the model
    except PlphpError as error:
        reason = str(error)
    try:
        return Examined(attachable, reason, windows, footprint(model, length), "")
    except UnsupportedModelError as error:
        return Examined(attachable, reason, windows, None, str(error))


def _refused(model: Any) -> dict[str, str]:
    """The sequence methods that cannot be attached to a model, and why."""
    from plphp.hf import prune

    found = {}
    for name in SEQUENCE_METHODS:
        try:
            prune(model, name).remove()
        except (PlphpError, ValueError) as error:
            found[name] = str(error)
    return found


def _notes(config: Any, seen: Examined, length: int) -> tuple[str, ...]:
    """Notes on a prompt of `length` tokens: it is too long, or no layer is pruned."""
    notes = []
    text = config.get_text_config(decoder=True)
    most = next((n for key in POSITIONS if isinstance(n := getattr(text, key, None), int)), 0)
    if 0 < most < length:
        notes.append(
            f"the prompt has {length:,} tokens, and the model's config allows {most:,} positions: "
            "use fewer images or less text"
        )
    if seen.attachable and not seen.pruned_at(length):
        notes.append("nothing is pruned, because no layer's attention window covers this prompt")
    return tuple(notes)


def _found_by(config: Any) -> str:
    from plphp.models import FAMILIES, describes_vision

    if not describes_vision(config):
        return "the processor's mm_token_type_ids, or a vision_mask that you pass"
    known = f"plphp knows how {config.model_type} lays out an image"
    if config.model_type not in FAMILIES:
        known = f"an unbroken run is one image, since plphp does not know {config.model_type}"
    return f"the image and video token ids of the config; {known}"
