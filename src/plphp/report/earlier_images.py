"""The share of the images of earlier turns that a later turn finds in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from plphp.report.layers import LayerReport, Seen


@dataclass(frozen=True)
class EarlierImage:
    """An image or video of an earlier turn, and the share of it that a prompt found.

    row: row of the batch
    image: number of the image in the row's conversation, from 1
    tokens: number of its vision tokens
    kept: share of its keys and values that the cache still has, over layers and KV heads, 0 to 1
    """

    row: int
    image: int
    tokens: int
    kept: float


def images_left(
    seen: Seen, layers: Sequence[LayerReport], earlier: Sequence[EarlierImage]
) -> tuple[EarlierImage, ...]:
    """The images of a prompt and of the turns before it, as the next prompt finds them.

    seen, layers, earlier: these fields of the prompt's `Report`
    """
    heads = sum(layer.kept.shape[1] for layer in layers)
    images = list(earlier)
    for row, (spans, positions) in enumerate(zip(seen.spans, seen.positions, strict=True)):
        before = sum(image.row == row for image in earlier)
        vision = spans > 0
        image_at = torch.zeros(int(positions.max()) + 1, dtype=torch.int64)
        image_at[positions[vision]] = spans[vision]
        kept = torch.cat([layer.kept[row].flatten() for layer in layers])
        counts = torch.bincount(image_at[kept[kept >= 0]], minlength=int(spans.max()) + 1)
        for number, (image, size) in enumerate(_sizes(spans), start=before + 1):
            share = float(counts[image]) / (size * heads) if heads else 1.0
            images.append(EarlierImage(row, number, size, share))
    return tuple(images)


def images_of(spans: Tensor, entered: Sequence[Tensor | None] = ()) -> tuple[EarlierImage, ...]:
    """The images of a conversation whose caches have lost no token.

    spans: (B, columns) int64 on the CPU, of the whole conversation
    entered: of each layer (B, columns) bool, the columns that it was given; None for all
    """
    return tuple(
        EarlierImage(row, number, size, _share(row_spans == image, row, entered))
        for row, row_spans in enumerate(spans)
        for number, (image, size) in enumerate(_sizes(row_spans), start=1)
    )


def _share(image: Tensor, row: int, entered: Sequence[Tensor | None]) -> float:
    """The share of the columns (N,) bool of an image that entered the layers, in their mean."""
    shares = [
        1.0
        if mask is None
        else float(mask[row, : len(image)][image[: mask.shape[1]]].float().mean())
        for mask in entered
    ]
    return sum(shares) / len(shares) if shares else 1.0


def _sizes(spans: Tensor) -> list[tuple[int, int]]:
    """The code of every image in the spans (N,) of a row and its number of tokens, in order."""
    counts = torch.bincount(spans[spans > 0]).tolist()
    return [(image, size) for image, size in enumerate(counts) if size]


def in_rows(images: Sequence[EarlierImage], rows: Sequence[int]) -> tuple[EarlierImage, ...]:
    """The images of a batch whose rows have been put in another order, or repeated.

    rows: for each row of the new batch, its index in the old one
    """
    return tuple(
        replace(image, row=new)
        for new, old in enumerate(rows)
        for image in images
        if image.row == old
    )


def earlier_images_note(images: Sequence[EarlierImage], home: str | None = None) -> str:
    """The note of a report on the images of earlier turns, in one line.

    home: the name of a home that parks rounded numbers, None for others
    """
    tokens = sum(image.tokens for image in images)
    kept = sum(image.tokens * image.kept for image in images)
    numbers = sorted({image.image for image in images})
    which = f"image {numbers[0]}" if len(numbers) == 1 else f"images 1 to {numbers[-1]}"
    whose = "its" if len(numbers) == 1 else "their"
    if round(kept) == tokens:
        suffix = "" if home is None else f", what was parked as {home} numbers"
        return f"{which} of earlier turns: all {tokens} vision tokens were there{suffix}"
    return (
        f"{which} of earlier turns: {1 - kept / tokens:.1%} of {whose} K/V is gone, "
        f"{tokens - kept:.0f} of {tokens} vision tokens in the mean of layers and KV heads; "
        "with recall nothing would be missing"
    )
