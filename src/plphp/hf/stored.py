"""The parts of a saved conversation, checked against each other and against the model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.hf.cache import PrunedCache
from plphp.hf.fingerprint import dtypes_of, layer_shapes, name_of
from plphp.hf.layer import PrunedLayer
from plphp.recall import HOMES, Home, Recall, Saved, from_format_1
from plphp.recall.slot_order import Vision
from plphp.report import EarlierImage

PARKED = "parked."
FARTHEST = 2**31 - 1  # columns: the positions of slots are int32
MISSING = object()


class Stored:
    """A file's header and tensors. Every method raises ValueError for what does not fit.

    Nothing here allocates by a number of the header: such numbers are compared with shapes.
    """

    def __init__(
        self,
        model: Any,
        header: dict[str, Any],
        tensors: dict[str, Tensor],
        layers: list[dict[str, Any]],
    ) -> None:
        """layers: the header's, one JSON object each."""
        self.header, self.tensors, self.layers = header, tensors, layers
        self.shapes, self.dtypes = layer_shapes(model), dtypes_of(model)
        self.read: set[str] = set()
        self.recall: Recall | None = None
        self.vision: Vision | None = None
        self.rows = len(self._tensor("0.start", (-1,), torch.int64))
        self.logical: int = layers[0].get("logical", 0)
        if not whole(self.logical, 1, FARTHEST) or not self.rows:
            raise ValueError("layer 0: its lengths make no sense")

    def common(self, cache: PrunedCache) -> None:
        """Give a cache what its layers have in common."""
        shared = cache.shared
        self.recall = shared.recall
        cache.shift = self._tensor("shift", (self.rows,), torch.int64, torch.int32)
        if bool((cache.shift.abs() > FARTHEST).any()):
            raise ValueError("its positions make no sense")
        last = 0
        if self.recall is not None:
            spans = self._tensor("spans", (self.rows, -1), torch.int64)
            last = self._checked_spans(spans)
            shared.spans, self.vision = spans, Vision.of(spans)
        shared.last_image = self.header.get("last_image", MISSING)
        if not whole(shared.last_image, last, self.logical):
            raise ValueError("its last image makes no sense")
        images = self.header.get("images", MISSING)
        if not isinstance(images, list):
            raise ValueError("it does not list its images")
        cache._found = tuple(self._image(image) for image in images)

    def layer(self, index: int, layer: Any, parks: bool) -> None:
        """Give a layer what it holds. parks: whether it is one whose vision tokens are parked."""
        if not isinstance(layer, PrunedLayer):
            raise ValueError(f"layer {index} of this model is left to transformers: nothing loads")
        numbers = self.layers[index]
        raw = numbers.get("raw")
        if not isinstance(raw, bool):
            raise ValueError(f"layer {index}: it does not say whether it is whole")
        try:
            store = self._store(index, numbers, layer.window, raw)
            home = self._home(index, numbers, store, parks)
            self._check_slots(store, home, raw)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        layer.store, layer.parked, layer.raw, layer.is_initialized = store, home, raw, True

    def check_names(self) -> None:
        """Check that there is nothing in the file that nobody asked for."""
        if more := sorted(set(self.tensors) - self.read):
            raise ValueError(f"it has a tensor that is none of a conversation's: {more[0][:60]!r}")

    def _tensor(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """A tensor of a shape, -1 where any size goes, and one of these dtypes, by default any."""
        self.read.add(name)
        found = self.tensors.get(name)
        if found is None:
            raise ValueError(f"{name!r} is missing")
        sizes = [size if size >= 0 else own for size, own in zip(shape, found.shape, strict=False)]
        if len(shape) != found.dim() or list(found.shape) != sizes:
            wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
            raise ValueError(
                f"the sizes of {name}, {tuple(found.shape)}, do not fit: ({wanted}) wanted"
            )
        if dtypes and found.dtype not in dtypes:
            raise ValueError(f"{name} is {found.dtype}, not {dtypes[0]}")
        return found

    def _checked_spans(self, spans: Tensor) -> int:
        """Check spans (B, N); returns the columns up to the last vision token."""
        if bool(((spans < -1) | (spans > spans.shape[1])).any()):
            raise ValueError("its spans make no sense: an image has no such number")
        seen = (spans > 0).any(0).nonzero()[:, 0]
        last = int(seen[-1]) + 1 if len(seen) else 0
        if last > self.logical:
            raise ValueError("its spans make no sense: an image lies beyond what was read")
        return last

    def _image(self, image: Any) -> EarlierImage:
        names = {"row", "image", "tokens", "kept"}
        if isinstance(image, dict) and set(image) == names:
            kept = image["kept"]
            share = isinstance(kept, float | int) and not isinstance(kept, bool)
            if (
                whole(image["row"], 0, self.rows - 1)
                and whole(image["image"], 1, FARTHEST)
                and whole(image["tokens"], 1, FARTHEST)
                and share
                and 0 <= kept <= 1  # neither NaN nor a number too large for a float
            ):
                return EarlierImage(**image)
        raise ValueError("its list of images makes no sense")

    def _store(self, index: int, numbers: dict[str, Any], window: int | None, raw: bool) -> KVStore:
        """The keys and values of one layer."""
        end: int = numbers.get("end", 0)
        logical: int = numbers.get("logical", 0)
        if not whole(end, 1, self.logical) or not whole(logical, self.logical, self.logical):
            raise ValueError("its lengths make no sense")
        start = self._tensor(f"{index}.start", (self.rows,), torch.int64)
        heads, dim, value = self.shapes.get(index, (None, None, None))
        keys = self._tensor(f"{index}.keys", (self.rows, heads or -1, end, dim or -1))
        values = self._tensor(f"{index}.values", (*keys.shape[:3], value or -1), keys.dtype)
        if self.header["format"] == 1:
            fits = keys.dtype in self.dtypes
        else:
            fits = numbers.get("dtype") == name_of(keys.dtype)
        if not fits or not keys.is_floating_point() or 0 in (*keys.shape, *values.shape):
            raise ValueError(f"keys of {name_of(keys.dtype)} are not what this model computes with")
        if bool(((start < 0) | (start >= end)).any()):
            raise ValueError("its row starts make no sense")
        if raw and (end != logical or bool(start.any())):
            raise ValueError("its lengths make no sense: it says that nothing was dropped")
        store = KVStore(keys, values, window)
        if window is not None:
            name = f"{index}.positions"
            store.positions = self._tensor(name, tuple(keys.shape[:3]), torch.int32)
        store.start, store.ragged, store.logical = start, bool((start > 0).any()), self.logical
        return store

    def _home(
        self, index: int, numbers: dict[str, Any], store: KVStore, parks: bool
    ) -> Home | None:
        """One layer's parked tokens, None where there are none."""
        said = numbers.get("parked")
        wanted = parks and self.vision is not None and self.vision.most > 0
        if not wanted or self.vision is None or self.recall is None:
            if said is not None:
                raise ValueError("it says that tokens are parked, and there are none")
            return None
        if not isinstance(said, dict):
            raise ValueError("it does not say what is parked")
        begin = f"{index}.{PARKED}"
        own = {n.removeprefix(begin): x for n, x in self.tensors.items() if n.startswith(begin)}
        self.read |= {begin + name for name in own}
        saved = from_format_1(own, said) if self.header["format"] == 1 else Saved(own, said)
        return HOMES[self.recall.home].restored(saved, self.recall, store, self.vision.spans)

    def _check_slots(self, store: KVStore, home: Home | None, raw: bool) -> None:
        """Check which columns the slots say they are, as far as that follows from the rest."""
        own, vision = store.end - store.start, self.vision
        alone = home is None and not raw
        if alone and vision is not None and not torch.equal(own, vision.text(self.logical)):
            raise ValueError("what is held does not fit the spans: a text token is missing")
        if store.positions is None:
            return
        for row, start in enumerate(store.start.tolist()):
            held = store.positions[row, :, start:].long()
            if self.vision is not None and not raw:
                known = self.vision.text_columns(row, self.logical).expand(len(held), -1)
                if home is not None:
                    known = torch.cat([home.slot_columns(store, row), known], 1)
                fits = torch.equal(held, known)
            else:
                steps = held[:, 1:] - held[:, :-1]
                fits = bool((held[:, 0] >= 0).all()) and bool((steps > 0).all())
                fits = fits and int(held.max()) < self.logical
            if not fits:
                raise ValueError("the positions of its slots make no sense")


def whole(value: Any, least: int, most: int) -> bool:
    """Whether a value of a header is an integer in a range."""
    return type(value) is int and least <= value <= most
