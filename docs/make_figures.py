"""Draw docs/figures/kept.png from a run of the embedded model: `make figures`."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import torch
from PIL import Image
from torch import Tensor

import plphp
import plphp.demo
from plphp.demo.model import load

matplotlib.use("Agg")
from matplotlib import pyplot as plt

DEMO = Path(plphp.demo.__file__).parent
QUESTION = 9  # of questions.json: six pictures, the question is about the first
COLORS = {
    "vision-indifferent": "#9aa5b1",
    "vision-balanced": "#e0b050",
    "vision-attentive": "#2f6fb0",
}


@dataclass(frozen=True)
class Shown:
    """One prompt, its report, and the picture over which its tokens are drawn.

    kept: (layers, Hkv, rows, columns) bool, the grid of the picture's vision tokens
    """

    report: plphp.Report
    policy: plphp.PLPHP
    question: str
    picture: Image.Image
    kept: Tensor


def run() -> Shown:
    """Ask the embedded model one bundled question, pruned with the paper's options."""
    entry: dict[str, Any] = json.loads((DEMO / "questions.json").read_text())[QUESTION]
    pictures = [Image.open(DEMO / "pictures" / n).convert("RGB") for n in entry["images"]]
    embedded = load()
    policy = plphp.PLPHP()
    inputs = embedded.inputs(pictures, entry["question"])
    with torch.inference_mode(), plphp.prune(embedded.model, policy) as pruning:
        embedded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    assert pruning.report is not None
    spans = plphp.vision_spans(embedded.model.config, **inputs)[0]
    merge = embedded.model.config.vision_config.spatial_merge_size
    _, height, width = (int(n) for n in inputs["image_grid_thw"][0])
    first = (spans == 1).nonzero()[:, 0]
    kept = torch.stack(
        [
            torch.stack([torch.isin(first, head) for head in layer.kept[0]])
            for layer in pruning.report.layers
        ]
    )
    grid = kept.view(*kept.shape[:2], height // merge, width // merge)
    return Shown(pruning.report, policy, entry["question"], pictures[0], grid)


def draw(shown: Shown, path: Path) -> None:
    """Draw the vision attention of every layer, and the tokens that single heads keep."""
    heads = shown.kept.shape[1]
    figure = plt.figure(figsize=(9.6, 3.4), facecolor="white", layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.35])
    _gammas(left.subplots(), shown)
    gammas = [layer.gamma[0] for layer in shown.report.layers]
    rows = (gammas.index(min(gammas)), gammas.index(max(gammas)))
    axes = right.subplots(2, heads)
    heading = f'Picture 1 of 6, "{shown.question}": tokens that each head keeps'
    right.suptitle(heading, fontsize=9)
    for row, layer in enumerate(rows):
        for head in range(heads):
            _picture(axes[row][head], shown.picture, shown.kept[layer, head])
            title = f"layer {layer}" if head == 0 else ""
            axes[row][head].set_ylabel(title, fontsize=8)
            if row == 0:
                axes[row][head].set_title(f"KV head {head}", fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    # With a palette the file has half the bytes.
    Image.open(path).convert("RGB").quantize(256, kmeans=1).save(path, optimize=True)


def _gammas(axes: Any, shown: Shown) -> None:
    layers = shown.report.layers
    for layer in layers:
        name = str(layer.layer_class[0])
        axes.bar(layer.layer, layer.gamma[0], color=COLORS[name])
        text = f"{layer.rate[0]:.0%}"
        axes.text(layer.layer, layer.gamma[0] + 0.015, text, ha="center", fontsize=8)
    for name in ("alpha", "beta"):
        value = getattr(shown.policy, name)
        axes.axhline(value, color="black", linewidth=0.8, linestyle="--")
        axes.text(len(layers) - 0.4, value + 0.012, f"{name} = {value}", fontsize=8)
    axes.set(xlabel="layer", ylim=(0, 1), xlim=(-0.6, len(layers) + 1.0))
    axes.set_xticks(range(len(layers)))
    axes.set_ylabel("vision attention (gamma)", fontsize=9)
    axes.set_title("Vision attention and kept share of each layer", fontsize=9)
    used = [name for name in COLORS if any(a.layer_class[0] == name for a in layers)]
    bars = [plt.Rectangle((0, 0), 1, 1, color=COLORS[name]) for name in used]
    axes.legend(bars, used, fontsize=8, frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def _picture(axes: Any, picture: Image.Image, kept: Tensor) -> None:
    """Draw the picture, and cover the tokens that a head dropped."""
    rows, columns = kept.shape
    width, height = picture.size
    axes.imshow(picture)
    for row, column in (~kept).nonzero().tolist():
        corner = (column * width / columns - 0.5, row * height / rows - 0.5)
        size = (width / columns, height / rows)
        axes.add_patch(plt.Rectangle(corner, *size, color="#5f6b7a", alpha=0.75, linewidth=0))
    axes.set(xticks=[], yticks=[])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "figures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    draw(run(), out / "kept.png")


if __name__ == "__main__":
    main()
