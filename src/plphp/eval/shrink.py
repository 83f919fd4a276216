"""The control `downsample`: images and frames are made smaller until they take as few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from PIL import Image

from plphp.errors import UnsupportedModelError
from plphp.eval.sample import Sample
from plphp.inputs import Clip, Loaded, Runnable


@dataclass(frozen=True)
class Shrinker:
    """A model whose image processor does not enlarge small images.

    loaded: the model with such an image processor
    native: the original image processor, which gives the size of an image for the model
    multiple: side of the square of pixels that makes one vision token
    """

    loaded: Runnable
    native: Any
    multiple: int

    def shrink(self, samples: Sequence[Sample], policy: Any) -> list[Sample]:
        """The samples with smaller images. policy: of kind "images"."""
        return [
            replace(sample, images=tuple(self._smaller(image, policy) for image in sample.images))
            for sample in samples
        ]

    def _smaller(self, shown: Image.Image | Clip, policy: Any) -> Image.Image | Clip:
        """An image or all frames of a clip, at the size that the policy gives them."""
        if isinstance(shown, tuple):
            return tuple(self.smaller(frame, policy) for frame in shown)
        return self.smaller(shown, policy)

    def smaller(self, image: Image.Image, policy: Any) -> Image.Image:
        """One image, at the size that the policy gives it."""
        _, rows, columns = (int(n) for n in self.native(images=[image])["image_grid_thw"][0])
        patch = self.multiple // self.native.merge_size
        size = policy.size(columns * patch, rows * patch, self.multiple)
        return image.resize(size, Image.Resampling.LANCZOS)


def shrinker(loaded: Runnable) -> Shrinker:
    """The shrinker of a model whose number of vision tokens depends on the size of the image.

    Raises UnsupportedModelError for other models, for which a smaller image has as many tokens.
    """
    processor: Any = getattr(loaded, "image_processor", None)
    if processor is None:
        processor = getattr(getattr(loaded, "processor", None), "image_processor", None)
    patch, merge = (getattr(processor, name, None) for name in ("patch_size", "merge_size"))
    size = dict(getattr(processor, "size", None) or {})
    if not isinstance(patch, int) or not isinstance(merge, int) or "shortest_edge" not in size:
        raise UnsupportedModelError(
            "downsample needs a processor whose number of vision tokens depends on the size of the "
            "image (with patch_size, merge_size and size['shortest_edge'], such as Qwen-VL's): "
            "the processor of this model resizes images to sizes of its own"
        )
    multiple = patch * merge
    without_enlarging = type(processor)(
        **{**processor.to_dict(), "size": {**dict(size), "shortest_edge": multiple**2}}
    )
    return Shrinker(_with(loaded, without_enlarging), processor, multiple)


def _with(loaded: Runnable, processor: Any) -> Runnable:
    """The same model with another image processor."""
    if isinstance(loaded, Loaded):
        import copy

        outer = copy.copy(loaded.processor)
        outer.image_processor = processor
        return replace(loaded, processor=outer)
    assert is_dataclass(loaded)
    return replace(loaded, image_processor=processor)  # type: ignore[return-value, call-arg]
