"""The frames of videos that the model read, whichever the processor sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def shown_videos(config: Any, inputs: Mapping[str, Any]) -> list[list[Image.Image]]:
    """The frames of each video, as many as its tokens distinguish, from the model's inputs."""
    pixels, grids = inputs.get("pixel_values_videos"), inputs.get("video_grid_thw")
    if pixels is None:
        return []
    if grids is None:
        return [frames_of(video) for video in pixels] if pixels.dim() == 5 else []
    return [frames_of(frames) for frames in _unpatched(config.vision_config, pixels, grids)]


def frames_of(pixels: Tensor) -> list[Image.Image]:
    """Images of normalized frames (F, 3, H, W), scaled to the range 0 to 255."""
    pixels = pixels.float()
    low, high = pixels.amin(), pixels.amax()
    scaled = ((pixels - low) / (high - low).clamp(min=1e-6) * 255).round().to(torch.uint8)
    return [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in scaled]


def _unpatched(vision: Any, pixels: Tensor, grids: Tensor) -> Iterator[Tensor]:
    """Frames (t, 3, H, W) of every video, from the rows of patches of Qwen-VL.

    pixels: (patches, 3 * times * patch^2); the patches of a merged square are adjacent. Of the
        `times` frames that share tokens the first is used
    grids: (videos, 3), t, h, w in patches
    """
    merge, patch = int(vision.spatial_merge_size), int(vision.patch_size)
    start = 0
    for t, h, w in grids.tolist():
        rows = pixels[start : start + t * h * w]
        start += t * h * w
        split = rows.view(t, h // merge, w // merge, merge, merge, 3, -1, patch, patch)
        frames = split[:, :, :, :, :, :, 0].permute(0, 5, 1, 3, 6, 2, 4, 7)
        yield frames.reshape(t, 3, h * patch, w * patch)
