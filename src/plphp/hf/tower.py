"""The seam in a vision tower, for methods that choose by the tower's own attention (VisionZip).

It is known for models whose vision tokens are patches of the tower, or groups of patches, each one
projected by itself. The attention of the layer whose output the projector gets is given a view of
its config that names an attention function of plphp's, which notes queries and keys and calls the
model's own. A hook on the projector lets the method choose, and change the features that enter it.
What stays waits in the thread's `pruning.calls.stays` for the language model.
"""

from __future__ import annotations

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
    projector: takes the features (..., E) of the patches of all images
    group: the number of consecutive patches that become one vision token
    """

    attention: nn.Module
    projector: nn.Module
    group: int


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
    base = getattr(model, "model", model)
    if names is not None and isinstance(layer, int):
        tower, projector = (base.get_submodule(n) for n in (names.tower, names.projector))
        found = [m for m in tower.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
        place = len(found) + layer if layer < 0 else layer - 1
        if 0 <= place < len(found):
            compat.original_attention(found[place], found[place].config)
            side = model.config.vision_config.spatial_merge_size if names.grouped else 1
            return Tower(found[place], projector, side**2)
    raise UnsupportedModelError(
        "visionzip reads the attention of the vision tower, which plphp cannot do in "
        f"{type(model).__name__}: use divprune, or a model of LLaVA, PaliGemma or Qwen2-VL"
    )


def attach_tower(pruning: Pruning, method: HiddenPolicy) -> None:
    """Set the hooks in the tower of the attached model, which `pruning.remove` undoes."""
    tower = tower_of(pruning.model)
    compat.register_attention(noting_attention, ATTENTION)
    pruning._set(tower.attention, "config", TowerConfig(tower.attention, pruning))
    condense = partial(_condense, pruning, tower, method)
    pruning._undo.append(tower.projector.register_forward_pre_hook(condense).remove)


def noting_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """transformers' attention interface, for the hooked layer of a tower.

    query, key: (I, H, N, D) of I images of N tokens, noted in the thread's `pruning.calls.noted`
    """
    view: Any = module.config
    noted = vars(view.pruning.calls).setdefault("noted", [])
    noted.append((query.detach(), key.detach(), compat.scale(query, kwargs)))
    original = compat.original_attention(module, view.original)
    return original(view.module_view, query, key, value, *args, **kwargs)


def stays_of(pruning: Pruning, spans: Tensor, repeats: int) -> Tensor:
    """The tokens that stay, (B, N) bool, by what the tower has chosen for the prompt's images.

    spans: (B, N) int64 of the prompt; repeats: how many rows of the model each row of the prompt
        became, as with beams
    Raises UnsupportedModeError where the tower has not encoded these images.
    """
    found: list[Tensor] = getattr(pruning.calls, "stays", [])
    if len(found) > 1:  # images, then videos, which a prompt may have in another order
        raise UnsupportedModeError("visionzip cannot be used with images and videos in one prompt")
    flat = found[0] if found else torch.zeros(0, dtype=torch.bool)
    for times in (1, repeats):
        vision = spans[::times] > 0
        if int(vision.sum()) == len(flat):
            stays = torch.zeros_like(vision)
            stays[vision] = flat.to(spans.device)
            return stays.repeat_interleave(times, dim=0)
    raise UnsupportedModeError(
        f"visionzip chooses in the vision tower, which has encoded {len(flat)} of the prompt's "
        f"{int((spans > 0).sum())} vision tokens: pass the pixels of all images, and no features"
    )


def _condense(
    pruning: Pruning, tower: Tower, method: HiddenPolicy, module: nn.Module, args: Any
) -> tuple[Any, ...]:
    """Forward pre-hook of the projector: let the method choose, and change its features.

    Raises UnsupportedModeError for features that the tower has not just made.
    """
    features = args[0]
    noted = vars(pruning.calls).pop("noted", [])
    images = [one for q, k, scale in noted for one in zip(q, k, [scale] * len(q), strict=True)]
    if not images:
        raise UnsupportedModeError("visionzip needs the tower to run before its projector")
    leading = (sum(q.shape[1] for q, *_ in images) - features[..., 0].numel()) // len(images)
    sizes = [q.shape[1] - leading for q, *_ in images]
    parts, stays = [], []
    for image, own in zip(images, features.flatten(0, -2).split(sizes), strict=True):
        with torch.no_grad():
            seen = tower_view(own, *image, leading, tower.group)
        chosen, changed = method.condense(seen)
        stays.append(chosen[0])
        parts.append(changed.reshape(own.shape))
    vars(pruning.calls).setdefault("stays", []).append(torch.cat(stays))
    return (torch.cat(parts).view_as(features), *args[1:])


def tower_view(
    features: Tensor, queries: Tensor, keys: Tensor, scale: float, leading: int, group: int
) -> TowerView:
    """What a method is shown of one image.

    features: (M group, E) of the patches; queries, keys: (H, N, D) of one image
    scale: factor of the attention logits; leading: 1 where a class token leads the N tokens, which
        the features are without, else 0; group: as in `Tower`
    """
    asking = queries[:, :1] if leading else queries
    probs = (asking.float() @ keys.float().transpose(1, 2) * scale).softmax(-1).mean((0, 1))
    own = keys.float().mean(0)[leading:]
    return TowerView(
        features=features.view(1, -1, group * features.shape[-1]),
        attention=probs[leading:].view(1, -1, group).mean(-1),
        keys=own.view(1, -1, group, own.shape[-1]).mean(2),
    )
