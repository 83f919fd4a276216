"""VisionZip, which chooses and merges in the vision tower, against a slow reference.

The reference runs the untouched model's tower with eager attention, chooses and merges patch by
patch in Python, and gives the language model the changed features while the dropped tokens are
hidden by the mask.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from test_sequence import dropped_columns, hidden_from
from torch import Tensor

import oracle
import plphp
import tiny
from invariants import EVERY, LOGITS, generate
from tiny.base import IMAGE, TEXT, VISION

BUDGET, SHARE = 0.4, 0.3
ROWS = [tiny.RowSpec(images=2, text=24), tiny.RowSpec(images=1, text=9)]
VIDEO = [tiny.RowSpec(images=0, text=12, videos=1)]


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


# name -> (family, config, the tower's layer, class tokens, patches of a token)
CASES = {
    "clip": ("llava", clip_config, -2, 1, 1),
    "siglip": ("llava", None, -2, 0, 1),
    "paligemma": ("paligemma", None, -1, 0, 1),
    "qwen2_vl": ("qwen2_vl", None, -1, 0, 4),
}


def made(name: str, rows: list[Any]) -> tuple[Any, dict[str, Tensor], Tensor]:
    family, config = EVERY[CASES[name][0]], CASES[name][1]
    model = family.build(0, config() if config else None)
    return model, *family.make_inputs(model, rows, 0)


@contextmanager
def watched(name: str, model: Any) -> Iterator[list[Any]]:
    """What each image's patches attend to in the layer: (attention [H, N, N], keys [H, N, D])."""
    found: list[Any] = []
    base = model.model
    tower = base.visual if name == "qwen2_vl" else base.vision_tower
    modules = [m for m in tower.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
    chosen = modules[CASES[name][2]]
    real = torch.nn.functional.scaled_dot_product_attention

    def look(module: Any, args: Any, kwargs: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention = note

    def end(module: Any, args: Any, output: Any) -> None:
        torch.nn.functional.scaled_dot_product_attention = real

    def note(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **more: Any) -> Tensor:
        logits = q.double() @ k.double().transpose(2, 3) * (scale or q.shape[-1] ** -0.5)
        found.extend(zip(logits.softmax(-1), k.double(), strict=True))
        return real(q, k, v, scale=scale, **more)

    handles = [chosen.register_forward_pre_hook(look, with_kwargs=True),
               chosen.register_forward_hook(end)]  # fmt: skip
    yield found
    for handle in handles:
        handle.remove()


def condensed(name: str, features: Tensor, seen: list[Any]) -> tuple[list[list[int]], Tensor]:
    """The tokens of each image that stay, and the changed features (..., E) of all patches."""
    _, _, _, leading, group = CASES[name]
    flat, first, stays = features.flatten(0, -2).double().clone(), 0, []
    for probs, keys in seen:
        patches = probs.shape[-1] - leading
        count = patches // group
        given = probs[:, 0] if leading else probs.mean(1)
        paid = [sum(float(given[:, leading + t * group + i].mean()) for i in range(group))
                for t in range(count)]  # fmt: skip
        key = [keys[:, leading + t * group :][:, :group].mean((0, 1)) for t in range(count)]
        kept = math.ceil(BUDGET * count - 1e-6)
        merged = round(SHARE * kept)
        best = sorted(range(count), key=lambda t: -paid[t])[: kept - merged]
        rest = [t for t in range(count) if t not in best]
        targets = rest[:: len(rest) // merged][:merged]
        own = flat[first : first + patches].view(count, -1).clone()
        groups: dict[int, list[int]] = {t: [] for t in targets}
        for t in rest:
            if t not in targets:
                alike = [float(key[t] @ key[o] / key[t].norm() / key[o].norm()) for o in targets]
                groups[targets[alike.index(max(alike))]].append(t)
        new = own.clone()
        for target, others in groups.items():
            if others:
                new[target] = own[target] + torch.stack([own[o] for o in others]).mean(0)
        flat[first : first + patches] = new.view(patches, -1)
        stays.append(sorted([*best, *targets]))
        first += patches
    return stays, flat.view(features.shape).to(features.dtype)


def reference(
    name: str, model: Any, inputs: dict[str, Tensor], spans: Tensor, tokens: Tensor
) -> tuple[list[list[int]], Tensor]:
    """The tokens of each image that stay, and the logits along an answer."""
    base = model.model
    projector = base.visual.merger if name == "qwen2_vl" else base.multi_modal_projector
    stays: list[list[int]] = []

    def change(module: Any, args: Any) -> Any:
        found, features = condensed(name, args[0], seen)
        stays.extend(found)
        seen.clear()
        return (features,)

    with watched(name, model) as seen, projector.register_forward_pre_hook(change):
        generate(model, inputs, steps=1)
        images = [(row, int(i)) for row, line in enumerate(spans) for i in line.unique() if i > 0]
        keep = torch.zeros_like(spans, dtype=torch.bool)
        left = list(stays)
        if len(images) < len(stays):  # one video, whose frames are encoded one by one
            size = int((spans > 0).sum()) // len(stays)
            left = [[n * size + t for n, frame in enumerate(stays) for t in frame]]
        for (row, number), tokens_left in zip(images, left, strict=True):
            columns = (spans[row] == number).nonzero()[:, 0]
            keep[row, columns[tokens_left]] = True
        stays.clear()
        model.set_attn_implementation({"text_config": "eager"})
        with hidden_from(model, 0, (spans > 0) & ~keep):
            logits = oracle.generate(model, inputs, tokens.shape[1], tokens)[1]
    return [row.nonzero()[:, 0].tolist() for row in keep], logits


@pytest.mark.parametrize(
    ("name", "rows"), [*((name, ROWS) for name in CASES), ("qwen2_vl", VIDEO)],
    ids=[*CASES, "video"],
)  # fmt: skip
def test_tokens_and_logits_are_those_of_the_reference(name: str, rows: list[Any]) -> None:
    model, inputs, spans = made(name, rows)
    policy = plphp.policy("visionzip", budget=BUDGET, contextual=SHARE)
    with plphp.prune(model, policy) as pruning:
        tokens, logits = generate(model, inputs)
        report = pruning.report
    stays, wanted = reference(name, model, inputs, spans, tokens)
    gone = dropped_columns(spans, report.stages[0].stays[:, None])
    assert [((row > 0) & ~out).nonzero()[:, 0].tolist()
            for row, out in zip(spans, gone, strict=True)] == stays  # fmt: skip
    assert (logits - wanted).abs().max() < LOGITS
    assert report.stages[0].kept == pytest.approx(BUDGET, abs=0.11)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prefill_chunk_size": 16}, {"again": True}])
def test_other_ways_to_generate(options: dict[str, Any]) -> None:
    model, inputs, _ = made("clip", ROWS)
    policy = [plphp.policy("visionzip"), plphp.policy("snapkv")]
    again = options.pop("again", False)
    with plphp.prune(model, policy) as pruning:
        wanted = generate(model, inputs)[0]
        plain = pruning.report
        if again:
            model(**inputs)  # a forward outside generate()
        else:
            tokens = generate(model, inputs, **options)[0]
        report = pruning.report
    copies = len(report.prompt) // len(plain.prompt)
    stays = plain.stages[0].stays.repeat_interleave(copies, 0)
    assert torch.equal(report.stages[0].stays, stays)
    assert again or "num_beams" in options or torch.equal(tokens, wanted)


def test_a_model_is_as_before_once_it_is_detached() -> None:
    model, inputs, _ = made("clip", ROWS)
    before = generate(model, inputs)[1]
    with plphp.prune(model, "visionzip"):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs)[1], before)
    assert all("config" not in vars(m) or type(m.config).__name__ != "TowerConfig"
               for m in model.modules())  # fmt: skip


@pytest.mark.parametrize("family", ["llava_next", "qwen3_vl", "internvl", "idefics3", "gemma3"])
def test_towers_that_are_not_known_are_refused(family: str) -> None:
    with pytest.raises(
        plphp.UnsupportedModelError, match="reads the attention of the vision tower"
    ):
        plphp.prune(EVERY[family].build(0), "visionzip")


def test_features_without_their_tower_are_refused() -> None:
    model, inputs, _ = made("clip", ROWS)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    spans = plphp.vision_spans(model.config, inputs["input_ids"])
    said = pytest.raises(plphp.UnsupportedModeError, match="encoded 0 of the prompt's 108")
    with plphp.prune(model, "visionzip", vision_mask=spans), said:
        model.generate(**given, max_new_tokens=2)
