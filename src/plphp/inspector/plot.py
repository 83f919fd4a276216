"""A matplotlib figure of a report, for papers and notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plphp.errors import InputError, how_to_install
from plphp.inspector.gather import pictures_of
from plphp.inspector.pictures import Media, first_frame
from plphp.report import Report

# Colours of Okabe and Ito, the same as on the page.
COLORS = {
    "vision-attentive": "#0072b2",
    "vision-balanced": "#d99a00",
    "vision-indifferent": "#9aa3ad",
    None: "#9aa3ad",
}
VEIL = "#59636e"
GONE = "#7a3e9d"  # over tokens that a sequence method had dropped before the layer


def plot(
    report: Report, images: Sequence[Media] = (), *, layer: int | None = None, row: int = 0
) -> Any:
    """Draw the vision attention and the kept share of every layer.

    images: draw below them the share of heads of one layer that kept each token
    layer: the layer of these pictures; None for the one that kept the fewest tokens

    Raises InputError if matplotlib is not installed or the images do not fit the report.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"plots need matplotlib: {how_to_install('inspector')}") from None
    shown = pictures_of(report, images, row=row) if images else ()
    figure: Any = Figure(figsize=(8, 5.4 if shown else 2.6), layout="constrained")
    above, below = figure.subfigures(2, 1) if shown else (figure, None)
    left, right = above.subplots(1, 2)
    _bars(left, right, report, row)
    if below is not None:
        chosen = _fewest(report) if layer is None else layer
        below.suptitle(_title(report, chosen), fontsize=9)
        kept, entered = _kept(report, chosen, row), _entered(report, chosen, row)
        every = below.subplots(1, len(shown), squeeze=False)[0]
        for axes, media, picture in zip(every, images, shown, strict=True):
            _overlay(axes, media, picture, kept, entered)
    return figure


def _title(report: Report, layer: int) -> str:
    """What the pictures show, with the method that dropped tokens before the layer."""
    title = f"layer {layer}: share of heads that kept a token"
    before = [s.method for s in report.stages if s.layer is not None and s.layer <= layer]
    return f"{title}; violet: dropped before by {before[0]}" if before else title


def _bars(left: Any, right: Any, report: Report, row: int) -> None:
    numbers = [layer.layer for layer in report.layers]
    classes = [layer.layer_class[row] for layer in report.layers]
    if report.recall is not None:  # where the class of a layer decides nothing
        classes = [None] * len(classes)
    colors = [COLORS[name] for name in classes]
    left.bar(numbers, [layer.gamma[row] for layer in report.layers], color=colors)
    left.set(xlabel="layer", ylabel="vision attention gamma", ylim=(0, 1))
    right.bar(numbers, [layer.retention for layer in report.layers], color=colors)
    right.set(xlabel="layer", ylabel="vision K/V kept", ylim=(0, 1))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def _fewest(report: Report) -> int:
    return min(report.layers, key=lambda layer: layer.retention).layer


def _kept(report: Report, layer: int, row: int) -> Tensor:
    """The share (V,) of a layer's KV heads that kept each vision token."""
    assert report.seen is not None
    vision = report.seen.vision(row)
    heads = report.layers[layer].kept[row]
    return (vision[:, None, None] == heads).any(-1).float().mean(-1)


def _entered(report: Report, layer: int, row: int) -> Tensor:
    """Which vision tokens (V,) bool entered a layer."""
    assert report.seen is not None
    vision = report.seen.vision(row)
    entered = report.entered(layer)
    return vision >= 0 if entered is None else torch.isin(vision, entered[row])


def _overlay(axes: Any, media: Media, picture: Any, kept: Tensor, entered: Tensor) -> None:
    """Draw the picture, or a video's first frame, and cover the tokens that heads dropped, in
    another colour those that never entered the layer."""
    from matplotlib.patches import Rectangle

    axes.imshow(first_frame(media), extent=(0, picture.width, picture.height, 0))
    views = set(picture.views)
    for token, box in enumerate(picture.boxes):
        # If a model reads tiles and the whole picture, show the tiles: they are finer.
        if box is None or picture.frame[token] or picture.views[token] != max(views):
            continue
        left, top, right, bottom = box
        alpha = 0.86 * (1 - float(kept[picture.first + token]))
        color = VEIL if entered[picture.first + token] else GONE
        veil = Rectangle(
            (left, top), right - left, bottom - top, color=color, alpha=alpha, linewidth=0
        )
        axes.add_patch(veil)
    axes.set(xticks=[], yticks=[], xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.set_title(picture.name, fontsize=8)
