"""The control that prunes nothing: pictures made smaller until they take as many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from PIL import Image

from plphp.errors import UnsupportedModelError
from plphp.eval.sample import Sample
from plphp.inputs import Loaded, Runnable


@dataclass(frozen=True)
class Shrinker:
    """A model that takes small pictures as they are.

    loaded: the same model behind an image processor that enlarges nothing
    native: one that enlarges them as usual: it says how large a picture is to the model
    multiple: pixels a side of one vision token
    """

    loaded: Runnable
    native: Any
    multiple: int

    def shrink(self, samples: Sequence[Sample], policy: Any) -> list[Sample]:
        """Samples with smaller pictures. policy: one of kind "images"."""
        return [
            replace(sample, images=tuple(self.smaller(image, policy) for image in sample.images))
            for sample in samples
        ]

    def smaller(self, image: Image.Image, policy: Any) -> Image.Image:
        """One picture, at the size that the policy gives it."""
        _, rows, columns = (int(n) for n in self.native(images=[image])["image_grid_thw"][0])
        patch = self.multiple // self.native.merge_size
        size = policy.size(columns * patch, rows * patch, self.multiple)
        return image.resize(size, Image.Resampling.LANCZOS)


def shrinker(loaded: Runnable) -> Shrinker:
    """A shrinker for a model whose image tokens follow the size of the picture.

    Raises UnsupportedModelError for any other: there a smaller picture takes as many tokens.
    """
    processor: Any = getattr(loaded, "image_processor", None)
    if processor is None:
        processor = getattr(getattr(loaded, "processor", None), "image_processor", None)
    patch, merge = (getattr(processor, name, None) for name in ("patch_size", "merge_size"))
    size = dict(getattr(processor, "size", None) or {})
    if not isinstance(patch, int) or not isinstance(merge, int) or "shortest_edge" not in size:
        raise UnsupportedModelError(
            "downsample needs a processor whose vision tokens follow the size of the picture "
            "(patch_size, merge_size and size['shortest_edge'], as Qwen-VL's): this model reads "
            "every picture at sizes of its own"
        )
    multiple = patch * merge
    willing = type(processor)(
        **{**processor.to_dict(), "size": {**dict(size), "shortest_edge": multiple**2}}
    )
    return Shrinker(_with(loaded, willing), processor, multiple)


def _with(loaded: Runnable, processor: Any) -> Runnable:
    """The same model behind another image processor."""
    if isinstance(loaded, Loaded):
        import copy

        outer = copy.copy(loaded.processor)
        outer.image_processor = processor
        return replace(loaded, processor=outer)
    assert is_dataclass(loaded)
    return replace(loaded, image_processor=processor)  # type: ignore[return-value, call-arg]
