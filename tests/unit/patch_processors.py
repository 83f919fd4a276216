"""The families' real image processors, at small sizes."""

from typing import Any

import transformers


def made(name: str, **options: Any) -> Any:
    """An image processor; None if this release of transformers needs torchvision for it."""
    try:
        return getattr(transformers, name)(**options)
    except ImportError:
        return None


NORMAL = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PINPOINTS = [[56, 112], [112, 56], [112, 112], [56, 168], [168, 56]]
CLIP = made("CLIPImageProcessorPil", size={"shortest_edge": 56}, crop_size=56, **NORMAL)
TIGHT = made("CLIPImageProcessorPil", size={"shortest_edge": 80}, crop_size=56, **NORMAL)
SIGLIP = made("SiglipImageProcessorPil", size={"height": 56, "width": 56}, **NORMAL)
PADDING = made(
    "LlavaImageProcessorPil", size={"shortest_edge": 56}, crop_size=56, do_pad=True, **NORMAL
)
IDEFICS3 = made(
    "Idefics3ImageProcessorPil",
    size={"longest_edge": 224},
    max_image_size={"longest_edge": 56},
    **NORMAL,
)
SMOLVLM = made(
    "SmolVLMImageProcessorPil",
    size={"longest_edge": 168},
    max_image_size={"longest_edge": 56},
    **NORMAL,
)
TILED = {"crop_to_patches": True, "min_patches": 1, "max_patches": 12}
GOT = made("GotOcr2ImageProcessorPil", size={"height": 56, "width": 56}, **TILED, **NORMAL)
OVIS = made("Ovis2ImageProcessorPil", size={"height": 56, "width": 56}, **TILED, **NORMAL)
NEXT = made(
    "LlavaNextImageProcessorPil",
    size={"shortest_edge": 56},
    crop_size=56,
    image_grid_pinpoints=PINPOINTS,
    **NORMAL,
)
ONEVISION = made(
    "LlavaOnevisionImageProcessorPil",
    size={"height": 56, "width": 56},
    image_grid_pinpoints=PINPOINTS,
    **NORMAL,
)
