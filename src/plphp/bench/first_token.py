"""The time to the first token, vision tower included, with methods and stages in turn.

The model has random weights, the classes of Qwen2-VL, the decoder of a shape and Qwen2-VL's vision
tower. If the decoder has fewer layers than the shape, the tower has fewer in proportion. A forward
of the whole model is timed: pixels in, logits of the last prompt token out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from plphp.bench import machine
from plphp.bench.caches import TEXT, Setting
from plphp.bench.shapes import SHAPES, Shape
from plphp.errors import InputError
from plphp.hf import prune
from plphp.hf.attached import Pruning
from plphp.policy import Policy, policy

IMAGE, BEGIN, END = 7, 8, 9  # token ids of an image's tokens, its first and its last mark
PATCH, MERGED = 14, 2
TOWER = (32, 1280, 16)  # layers, width and heads of Qwen2-VL's vision tower
TOWERS = {"tiny": (6, 320, 4)}
STOCK = "stock"


def named_policies(text: str) -> dict[str, Policy]:
    """The policies of comma-separated names such as "divprune:.5" or "divprune:.5/plphp".

    Raises InputError for a name that is none.
    """
    found = {}
    for name in dict.fromkeys(part.strip() for part in text.split(",") if part.strip()):
        try:
            made = policy(name)
        except ValueError as error:
            raise InputError(f"--first-token {name}: {error}") from None
        if made.kind == "images":
            raise InputError(f"--first-token {name}: this method makes the images smaller instead")
        found[name] = made
    if not found:
        raise InputError("--first-token is empty: name a method, such as divprune:.5")
    return found


def build(shape: Shape, dtype: torch.dtype, device: str) -> Any:
    """A Qwen2-VL model with the decoder of a shape, in evaluation mode.

    Raises InputError for a shape of another family.
    """
    if shape.config is not Qwen2Config:
        known = ", ".join(name for name, one in SHAPES.items() if one.config is Qwen2Config)
        raise InputError(f"--first-token has no vision tower for {shape.name}; it has for {known}")
    deep, wide, heads = TOWERS.get(shape.name, TOWER)
    config = Qwen2VLConfig(
        text_config={
            "num_hidden_layers": shape.layers,
            "hidden_size": shape.hidden,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "intermediate_size": shape.intermediate,
            "vocab_size": shape.vocabulary,
            "rope_parameters": _rope(shape),
        },
        vision_config={
            "depth": max(round(deep * shape.layers / SHAPES[shape.name].layers), 1),
            "embed_dim": wide,
            "num_heads": heads,
            "hidden_size": shape.hidden,
        },
        image_token_id=IMAGE,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


def _rope(shape: Shape) -> dict[str, Any]:
    """M-RoPE with Qwen2-VL's division of the frequencies: a quarter for time, the rest in two."""
    half = shape.head_dim // 2
    across = (half - half // 4) // 2
    parts = [half - 2 * across, across, across]
    return {"rope_type": "default", "mrope_section": parts, "rope_theta": 1e6}


def prompt(model: Any, setting: Setting) -> dict[str, Tensor]:
    """The inputs of one forward: `setting.images` images of equal size between two texts."""
    each = (setting.context - TEXT) // setting.images - 2
    if each < 1:
        raise InputError(f"--images {setting.images}: an image takes at least three columns here")
    rows = max(n for n in range(1, int(each**0.5) + 1) if each % n == 0)
    ids = [1] * (TEXT // 2) + ([BEGIN] + [IMAGE] * each + [END]) * setting.images
    ids += [1] * (setting.context - len(ids))
    grid = torch.tensor([[1, MERGED * rows, MERGED * each // rows]])
    count = setting.images * setting.batch
    pixels = torch.randn(int(grid.prod()) * count, 3 * 2 * PATCH**2, device=setting.device)
    tokens = torch.tensor([ids] * setting.batch, device=setting.device)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "mm_token_type_ids": (tokens == IMAGE).int(),
        "pixel_values": pixels.to(model.dtype),
        "image_grid_thw": grid.repeat(count, 1).to(setting.device),
    }


def first_token(
    model: Any,
    setting: Setting,
    policies: Mapping[str, Policy],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Rows of the result: transformers' own model first, then each policy, all in turn.

    The first round is a warm-up and is not counted. Each row has the median milliseconds of the
    whole and of the tower, and ratios to `stock` of the same round: median, lowest, highest; of the
    whole, and without the tower. It also has the share of the vision K/V that the prompt leaves in
    the cache, and what each stage left.
    """
    inputs, tower = prompt(model, setting), Stopwatch(model.model.visual, setting.device)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in (STOCK, *policies)}
    kept: dict[str, dict[str, Any]] = {STOCK: _kept(None)}
    with tower:
        for turn in range(rounds + 1):
            for name in spent:
                with _attached(model, policies.get(name)) as pruning, torch.inference_mode():
                    whole = timed(model, inputs, setting.device)
                kept[name] = _kept(pruning)
                if turn:
                    spent[name].append((whole, tower.seconds))
                advance()
    return [_row(name, found, spent[STOCK]) | kept[name] for name, found in spent.items()]


def _kept(pruning: Pruning | None) -> dict[str, Any]:
    """What is left of the vision K/V after the last prompt, in all and by stage."""
    if pruning is None or pruning.report is None:
        return {"kept": 1.0, "stages": []}
    report = pruning.report
    return {"kept": round(report.retention, 4), "stages": [s.to_dict() for s in report.stages]}


def _attached(model: Any, chosen: Policy | None) -> AbstractContextManager[Any]:
    return nullcontext() if chosen is None else prune(model, chosen)


def timed(
    model: Any,
    inputs: Mapping[str, Tensor],
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The seconds of one forward: pixels in, logits of the last prompt token out.

    clock: what counts them, such as time.process_time for those of the processor
    """
    machine.synchronize(device)
    start = clock()
    model(**inputs, use_cache=True, logits_to_keep=1)
    machine.synchronize(device)
    return clock() - start


def _row(
    name: str, mine: Sequence[tuple[float, float]], stock: Sequence[tuple[float, float]]
) -> dict[str, Any]:
    pairs = list(zip(mine, stock, strict=True))
    whole = [own[0] / theirs[0] for own, theirs in pairs]
    decoder = [(own[0] - own[1]) / (theirs[0] - theirs[1]) for own, theirs in pairs]
    return {
        "name": name,
        "ms": round(1e3 * median(one[0] for one in mine), 2),
        "tower_ms": round(1e3 * median(one[1] for one in mine), 2),
        "tower_share": round(median(one[1] / one[0] for one in mine), 3),
        "over_stock": [round(f(whole), 3) for f in (median, min, max)],
        "decoder_over_stock": [round(f(decoder), 3) for f in (median, min, max)],
    }


class Stopwatch:
    """Measures the last call of a module while it is entered; `seconds` has the result.

    clock: as in `timed`
    """

    def __init__(
        self, module: Any, device: str, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.module, self.device, self.clock, self.seconds = module, device, clock, 0.0
        self._start = 0.0
        self._handles: list[Any] = []

    def __enter__(self) -> Stopwatch:
        self._handles = [
            self.module.register_forward_pre_hook(self._begin),
            self.module.register_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *call: Any) -> None:
        machine.synchronize(self.device)
        self._start = self.clock()

    def _end(self, *call: Any) -> None:
        machine.synchronize(self.device)
        self.seconds = self.clock() - self._start
