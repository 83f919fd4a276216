"""The seam in a vision tower, for methods that choose by the tower's own attention (VisionZip).

It is known for models whose vision tokens are patches of the tower, or squares of patches, each one
projected by itself. The attention of the layer whose output the projector gets is given a view of
its config that names an attention function of plphp's, which notes queries and keys and calls the
model's own. A hook on the projector lets the method choose, and change the features that enter it.
What the projector gives for the patches that do not stay becomes NaN. In this way the choice
reaches the language model in whatever order a family writes tiles, windows and frames into the
prompt, and before layer 0 the NaN tokens leave.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from plphp.errors import UnsupportedModeError, UnsupportedModelError
from plphp.hf import compat
from plphp.hf.attached import Pruning
from plphp.hf.attention import ConfigView
from plphp.models import tower_names
from plphp.policy import HiddenPolicy, Policy, TowerView, sequence_stage

ATTENTION = "plphp_tower"  # the name of `noting_attention` in transformers' registry


@dataclass(frozen=True)
class Tower:
    """The modules of a vision tower that are hooked.

    attention: of the layer whose output the projector gets
    projector: takes the features of all images, (..., E)
    side: a vision token is a square of `side` x `side` patches
    rows: whether the tower orders patches row by row, else square by square
    """

    attention: nn.Module
    projector: nn.Module
    side: int
    rows: bool

    def by_token(self, values: Tensor) -> Tensor:
        """Values (M side^2, ...) of the patches of an image as (M, side^2, ...), by token."""
        if not self.rows:
            return values.view(-1, self.side**2, *values.shape[1:])
        squares = math.isqrt(len(values)) // self.side
        parts = values.view(squares, self.side, squares, self.side, *values.shape[1:])
        return parts.transpose(1, 2).reshape(-1, self.side**2, *values.shape[1:])

    def by_patch(self, values: Tensor) -> Tensor:
        """The inverse of `by_token`."""
        if not self.rows:
            return values.flatten(0, 1)
        squares = math.isqrt(len(values))
        parts = values.view(squares, squares, self.side, self.side, *values.shape[2:])
        return parts.transpose(1, 2).reshape(-1, *values.shape[2:])


@dataclass(frozen=True)
class Noted:
    """Queries and keys (H, N, D) of one image, the factor of their products, and its mask.

    mask: (1 or H, 1 or N, N) bool or additive, None where every patch is read
    """

    queries: Tensor
    keys: Tensor
    scale: float
    mask: Tensor | None


class TowerConfig(ConfigView):
    """The config of the tower's attention module, and where queries and keys are noted."""

    _attn_implementation = ATTENTION

    def __init__(self, module: nn.Module, pruning: Pruning) -> None:
        super().__init__(module)
        self.pruning = pruning


def tower_method(policy: Policy) -> HiddenPolicy | None:
    """The part of a policy that chooses in the vision tower, or None."""
    first = sequence_stage(policy)
    return first if isinstance(first, HiddenPolicy) and first.reads_tower else None


def tower_of(model: Any) -> Tower:
    """The tower of a model. Raises UnsupportedModelError for one whose attention is not known."""
    names, layer = tower_names(model.config), getattr(model.config, "vision_feature_layer", -1)
    base, why = getattr(model, "model", model), "the modules of its tower are not known"
    if names is not None:
        why = names.reason(model.config)
        if not why and not isinstance(layer, int):
            why = "it joins the features of several layers"
    if names is None or why:
        raise UnsupportedModelError(
            "visionzip chooses by the attention of the vision tower, which plphp cannot do in "
            f"{type(model).__name__}: {why}. Use a method such as divprune"
        )
    tower, projector = (base.get_submodule(n) for n in (names.tower, names.projector))
    found = [m for m in tower.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    attention = found[len(found) + layer if layer < 0 else layer - 1]
    compat.original_attention(attention, attention.config)
    return Tower(attention, projector, names.side(model.config), names.rows)


def attach_tower(pruning: Pruning, method: HiddenPolicy) -> None:
    """Set the hooks in the tower of the attached model, which `pruning.remove` undoes."""
    tower = tower_of(pruning.model)
    compat.register_attention(noting_attention, ATTENTION)
    pruning._set(tower.attention, "config", TowerConfig(tower.attention, pruning))
    condense = partial(_condense, pruning, tower, method)
    pruning._undo.append(tower.projector.register_forward_pre_hook(condense).remove)
    pruning._undo.append(tower.projector.register_forward_hook(partial(_mark, pruning)).remove)


def noting_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """transformers' attention interface, for the hooked layer of a tower.

    query, key: (I, H, N, D) of I images of N tokens, noted in the thread's `pruning.calls.noted`
    """
    view: Any = module.config
    mask = args[0] if args else kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:  # FlashAttention's, (I, N)
        mask = mask[:, None, None].bool()
    masks = [None] * len(query) if mask is None else mask.expand(len(query), *mask.shape[1:])
    scale = compat.scale(query, kwargs)
    vars(view.pruning.calls).setdefault("noted", []).extend(
        Noted(q.detach(), k.detach(), scale, m) for q, k, m in zip(query, key, masks, strict=True)
    )
    original = compat.original_attention(module, view.original)
    return original(view.module_view, query, key, value, *args, **kwargs)


def stays_of(pruning: Pruning, spans: Tensor, hidden: Tensor) -> Tensor:
    """The tokens that stay, (B, N) bool, by what the tower has chosen for the prompt's images.

    spans: (B, N) int64 of the prompt; hidden: (B, N, E), NaN for tokens that do not stay
    Raises UnsupportedModeError where the tower has not encoded these images.
    """
    gone = hidden[..., 0].isnan()
    if not getattr(pruning.calls, "condensed", False):
        why = "it has encoded none of this prompt: pass the pixels of all images, and no features"
    elif bool((gone & (spans <= 0)).any()):
        why = "vision_mask calls tokens text that it has encoded: leave vision_mask out"
    else:
        return ~gone
    raise UnsupportedModeError(f"visionzip chooses in the vision tower: {why}")


def without_marks(hidden: Tensor) -> Tensor:
    """Hidden states with zeros in place of NaN: fillers of a batch hold tokens that have left."""
    return hidden.masked_fill(hidden.isnan(), 0)


def _condense(
    pruning: Pruning, tower: Tower, method: HiddenPolicy, module: nn.Module, args: Any
) -> tuple[Any, ...]:
    """Forward pre-hook of the projector: let the method choose, and change its features.

    Raises UnsupportedModeError for features that the tower has not just made.
    """
    images: list[Noted] = vars(pruning.calls).pop("noted", [])
    if not images:
        raise UnsupportedModeError("visionzip needs the tower to run before its projector")
    flat = args[0].flatten(0, -2)
    sizes = [one.keys.shape[1] for one in images]
    leading, unit = _layout(sizes, len(flat), tower.side**2)
    parts, stays = [], []
    features = flat.split([(size - leading) // unit for size in sizes])
    for image, own in zip(images, features, strict=True):
        with torch.no_grad():
            seen = tower_view(tower, image, leading, own)
        chosen, changed = method.condense(seen)
        stays.append(chosen[0])
        parts.append(
            changed[0]
            if unit > 1
            else tower.by_patch(changed[0].view(len(chosen[0]), -1, own.shape[-1]))
        )
    pruning.calls.condensed, pruning.calls.chosen = True, torch.cat(stays)
    return (torch.cat(parts).view_as(args[0]), *args[1:])


def _mark(pruning: Pruning, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Forward hook of the projector: NaN for the tokens that do not stay."""
    gone = ~vars(pruning.calls).pop("chosen")
    return output.masked_fill(gone.view(*output.shape[:-1], 1).to(output.device), torch.nan)


def _layout(sizes: list[int], features: int, square: int) -> tuple[int, int]:
    """How a projector is given the patches of images.

    sizes: the tokens of each image in the tower; features: how many the projector is given
    square: the patches of a vision token
    Returns the class tokens that lead an image and are left out, 0 or 1, and the patches of a
    feature: 1, or `square` where the tower has joined them.
    """
    for leading in (0, 1):
        for unit in (1, square):
            if sum(sizes) - leading * len(sizes) == features * unit:
                return leading, unit
    raise UnsupportedModeError(
        f"visionzip: a tower gave {features} features of images of {sizes} patches: use divprune"
    )


def tower_view(tower: Tower, image: Noted, leading: int, features: Tensor) -> TowerView:
    """What a method is shown of one image.

    leading: 1 where a class token leads the tokens of the tower, which the features are without
    features: (M side^2, E) of the patches, or (M, E) of the tokens
    """
    asking = image.queries[:, :1] if leading else image.queries
    logits = asking.float() @ image.keys.float().transpose(1, 2) * image.scale
    if image.mask is not None:
        mask = image.mask[:, :1] if leading else image.mask
        read = mask.dtype == torch.bool
        logits = logits.masked_fill(~mask, -torch.inf) if read else logits + mask.float()
    probs = logits.softmax(-1).mean((0, 1))[leading:]
    own = image.keys.float().mean(0)[leading:]
    if len(features) == len(own):
        features = tower.by_token(features)
    return TowerView(
        features=features.reshape(1, len(own) // tower.side**2, -1),
        attention=tower.by_token(probs).mean(1)[None],
        keys=tower.by_token(own).mean(1)[None],
    )
