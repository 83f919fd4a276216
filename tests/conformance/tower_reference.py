"""A slow reference for methods that choose and merge in the vision tower, and its cases.

It runs the untouched model's tower with plain attention, chooses and merges patch by patch in
Python, and gives the language model the changed features while the dropped tokens are hidden by the
mask. Which token of the tower a column holds is seen from numbers in place of features.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from leaving import hidden_from, without
from torch import Tensor

import oracle
import tiny
from invariants import EVERY, generate
from tiny.base import IMAGE, TEXT, VISION

BUDGET, SHARE = 0.4, 0.3


def clip_config() -> Any:
    """LLaVA with a tower that has a class token, which the model drops."""
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(
            **VISION, num_hidden_layers=3, image_size=24, patch_size=tiny.base.PATCH
        ),
        image_token_index=IMAGE,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


@dataclass(frozen=True)
class Case:
    """layer: of the tower; leading: class tokens; side: a token is a square of side^2 patches;
    rows: whether patches are in rows, else square by square; joined: whether the projector gets
    the patches of a token as one feature."""

    family: str
    layer: int = -1
    leading: int = 0
    side: int = 1
    rows: bool = False
    joined: bool = False
    config: Any = None
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"


GRID = {"side": 2, "tower": "visual", "projector": "visual.merger"}
SHUFFLED = {"side": 2, "rows": True}
CONNECTED = {**SHUFFLED, "tower": "vision_model", "projector": "connector"}
CASES = {
    "clip": Case("llava", -2, 1, config=clip_config),
    "siglip": Case("llava", -2),
    "paligemma": Case("paligemma"),
    "llava_next": Case("llava_next", -2, 1),
    "qwen2_vl": Case("qwen2_vl", **GRID),
    "qwen2_5_vl": Case("qwen2_5_vl", **GRID),
    "qwen3_vl": Case("qwen3_vl", **GRID),
    "qwen3_vl_moe": Case("qwen3_vl_moe", **GRID),
    "qwen3_5": Case("qwen3_5", **GRID),
    "glm4v": Case("glm4v", joined=True, **GRID),
    "internvl": Case("internvl", leading=1, joined=True, **SHUFFLED),
    "idefics3": Case("idefics3", **CONNECTED),
    "smolvlm": Case("smolvlm", **CONNECTED),
    "aya_vision": Case("aya_vision", **SHUFFLED),
    "cohere2_vision": Case("cohere2_vision", **SHUFFLED),
    "gemma3": Case("gemma3", **SHUFFLED),
}


def made(name: str, rows: list[Any]) -> tuple[Any, dict[str, Tensor], Tensor]:
    family, config = EVERY[CASES[name].family], CASES[name].config
    model = family.build(0, config() if config else None)
    return model, *family.make_inputs(model, rows, 0)


@contextmanager
def watched(case: Case, model: Any) -> Iterator[list[Any]]:
    """What each image's patches attend to in the layer: (attention [H, N, N], keys [H, N, D])."""
    found: list[Any] = []
    tower = model.model.get_submodule(case.tower)
    modules = [m for m in tower.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    chosen = modules[case.layer]
    real = torch.nn.functional.scaled_dot_product_attention

    def look(module: Any, args: Any, kwargs: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention = note

    def end(module: Any, args: Any, output: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention = real

    def note(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **more: Any) -> Tensor:
        logits = q.double() @ k.double().transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
        if more.get("attn_mask") is not None:
            logits = logits.masked_fill(~more["attn_mask"], -math.inf)
        found.extend(zip(logits.softmax(-1), k.double(), strict=True))
        return real(q, k, v, scale=scale, **more)

    handles = [chosen.register_forward_pre_hook(look, with_kwargs=True),
               chosen.register_forward_hook(end)]  # fmt: skip
    yield found
    for handle in handles:
        handle.remove()


def squares(case: Case, patches: int) -> list[list[int]]:
    """The patches of each token of an image."""
    side, edge = case.side, math.isqrt(patches)
    if not case.rows:
        return [list(range(t, t + side**2)) for t in range(0, patches, side**2)]
    return [
        [(top + y) * edge + left + x for y in range(side) for x in range(side)]
        for top in range(0, edge, side)
        for left in range(0, edge, side)
    ]


def condensed(case: Case, features: Tensor, seen: list[Any]) -> tuple[list[bool], Tensor]:
    """Whether each token stays, and the changed features (..., E) of all patches."""
    flat, first, stays = features.flatten(0, -2).double().clone(), 0, []
    for probs, keys in seen:
        own = squares(case, probs.shape[-1] - case.leading)
        count = len(own)
        given = probs[:, 0] if case.leading else probs.mean(1)
        paid, key = [], []
        for patches in own:
            places = [case.leading + patch for patch in patches]
            paid.append(float(given[:, places].mean()))
            key.append(keys[:, places].mean((0, 1)))
        kept = math.ceil(BUDGET * count - 1e-6)
        merged = round(SHARE * kept)
        best = sorted(range(count), key=lambda t: -paid[t])[: kept - merged]
        rest = [t for t in range(count) if t not in best]
        targets = rest[:: len(rest) // merged][:merged]
        groups: dict[int, list[int]] = {t: [] for t in targets}
        for t in rest:
            if t not in targets:
                alike = [float(key[t] @ key[o] / key[t].norm() / key[o].norm()) for o in targets]
                groups[targets[alike.index(max(alike))]].append(t)
        rows = [[t] for t in range(count)] if case.joined else own
        before = flat[first : first + sum(map(len, rows))].clone()
        for target, others in groups.items():
            if others:
                added = torch.stack([before[rows[o]] for o in others]).mean(0)
                flat[[first + row for row in rows[target]]] = before[rows[target]] + added
        stays += [t in (*best, *targets) for t in range(count)]
        first += len(before)
    return stays, flat.view(features.shape).to(features.dtype)


def numbered(case: Case, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The number (B, N) int64 of the token of the tower in each column, from 1 in its order.

    0 for text and for line ends, which no patch becomes. The projector is made to give the number
    as the first of a feature's numbers, and the same number as all others.
    """
    total, found = 0, []

    def count(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal total
        changed = torch.full_like(output, 1000.0)
        size = output[..., 0].numel()
        changed[..., 0] = (torch.arange(size) + 1.0 + total).view(output.shape[:-1])
        total += size
        return changed

    def note(module: Any, args: Any, kwargs: Any) -> None:
        found.append(kwargs["inputs_embeds"])

    projector, decoder = model.model.get_submodule(case.projector), model.get_decoder()
    with (
        projector.register_forward_hook(count),
        decoder.register_forward_pre_hook(note, with_kwargs=True),
    ):
        generate(model, inputs, steps=1)
    embeds = found[0]
    number = (1000 * embeds[..., 0] / embeds[..., 1]).round()
    return torch.where((embeds[..., 1:] == embeds[..., 1:2]).all(-1), number, 0).long()


def reference(
    name: str, model: Any, inputs: dict[str, Tensor], spans: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """The vision tokens that stay, (B, N) bool, and the logits along an answer."""
    case = CASES[name]
    numbers = numbered(case, model, inputs)
    stays: list[bool] = []

    def change(module: Any, args: Any) -> Any:
        found, features = condensed(case, args[0], seen)
        stays.extend(found)
        seen.clear()
        return (features,)

    projector = model.model.get_submodule(case.projector)
    with watched(case, model) as seen, projector.register_forward_pre_hook(change):
        generate(model, inputs, steps=1)
        keep = (spans > 0) & torch.tensor([True, *stays])[numbers]
        assert sorted(numbers[numbers > 0].tolist())[-1] <= len(stays)
        if name == "qwen3_5":  # a mask cannot hide a column from a recurrent layer
            return keep, without(model, inputs, (spans > 0) & ~keep, tokens)[1]
        model.set_attn_implementation({"text_config": "eager"})
        with hidden_from(model, 0, (spans > 0) & ~keep):
            logits = oracle.generate(model, inputs, tokens.shape[1], tokens)[1]
    return keep, logits
