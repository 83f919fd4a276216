"""Checks the parts of a saved conversation against each other and the model, and loads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plphp.cache import KVStore
from plphp.hf.conversation import Conversation
from plphp.hf.fingerprint import dtypes_of, layer_shapes, name_of
from plphp.hf.layer import PrunedLayer
from plphp.recall import HOMES, Home, KeptBits, KeptCodes, Recall, Saved, from_format_1
from plphp.recall.slot_order import Vision
from plphp.report import EarlierImage

PARKED = "parked."  # prefix of the names of parked tensors
MAX_COLUMN = 2**31 - 1  # the columns of slots are int32
MISSING = object()


class Stored:
    """The header and the tensors of a file. Every method raises ValueError if they do not fit.

    No memory is allocated by a number of the header: such numbers are compared with shapes first.
    """

    def __init__(
        self,
        model: Any,
        header: dict[str, Any],
        tensors: dict[str, Tensor],
        layers: list[dict[str, Any]],
    ) -> None:
        """layers: the entries of the header for the layers, one JSON object each."""
        self.header, self.tensors, self.layers = header, tensors, layers
        self.shapes, self.dtypes = layer_shapes(model), dtypes_of(model)
        self.read: set[str] = set()
        self.recall: Recall | None = None
        self.kept: KeptBits | None = None
        self.vision: Vision | None = None
        self.rows = len(self._tensor("0.start", (-1,), torch.int64))
        self.logical: int = layers[0].get("logical", 0)
        if not is_integer(self.logical, 1, MAX_COLUMN) or not self.rows:
            raise ValueError("layer 0: the lengths in the header are inconsistent")

    def common(self, cache: Conversation) -> None:
        """Load the state that all layers share into a cache."""
        shared = cache.shared
        self.recall, self.kept = shared.recall, shared.kept
        cache.shift = self._tensor("shift", (self.rows,), torch.int64, torch.int32)
        if bool((cache.shift.abs() > MAX_COLUMN).any()):
            raise ValueError("the positions are out of range")
        last = 0
        if self.recall is not None:
            spans = self._tensor("spans", (self.rows, -1), torch.int64)
            last = self._checked_spans(spans)
            shared.spans, self.vision = spans, Vision.of(spans)
        shared.last_image = self.header.get("last_image", MISSING)
        if not is_integer(shared.last_image, last, self.logical):
            raise ValueError("the column of the last image is out of range")
        images = self.header.get("images", MISSING)
        if not isinstance(images, list):
            raise ValueError("the header has no list of the images")
        cache._found = tuple(self._image(image) for image in images)

    def layer(self, index: int, layer: Any, parks: bool) -> None:
        """Load one layer. parks: whether it is a layer that parks its vision tokens."""
        if not isinstance(layer, PrunedLayer):
            raise ValueError(
                f"layer {index} of this model is not pruned, so that nothing can be loaded into it"
            )
        numbers = self.layers[index]
        raw = numbers.get("raw")
        if not isinstance(raw, bool):
            raise ValueError(f"layer {index}: the header does not say whether tokens were dropped")
        try:
            store = self._store(index, numbers, layer.window, raw)
            codes = self._codes(index, numbers, store, parks)
            home = None if codes else self._home(index, numbers, store, parks)
            self._check_slots(store, home, raw)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from error
        layer.store, layer.parked, layer.raw, layer.is_initialized = store, home, raw, True
        layer.codes = codes

    def check_names(self) -> None:
        """Check that every tensor of the file has been read."""
        if unknown := sorted(set(self.tensors) - self.read):
            raise ValueError(f"the file has an unknown tensor: {unknown[0][:60]!r}")

    def _tensor(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
        """The tensor of a name. Raises ValueError for another shape or another dtype.

        shape: -1 stands for any size
        dtypes: the dtypes that are allowed; without any, all are
        """
        self.read.add(name)
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ValueError(f"the tensor {name!r} is missing")
        pairs = zip(shape, tensor.shape, strict=False)
        expected = [size if size >= 0 else actual for size, actual in pairs]
        if len(shape) != tensor.dim() or list(tensor.shape) != expected:
            wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
            raise ValueError(
                f"the tensor {name} has the shape {tuple(tensor.shape)}, which must be ({wanted})"
            )
        if dtypes and tensor.dtype not in dtypes:
            raise ValueError(f"the tensor {name} has the dtype {tensor.dtype}, not {dtypes[0]}")
        return tensor

    def _checked_spans(self, spans: Tensor) -> int:
        """Check spans (B, N); return the column after the last vision token, 0 without any."""
        if bool(((spans < -1) | (spans > spans.shape[1])).any()):
            raise ValueError("the spans are inconsistent: the number of an image is out of range")
        columns = (spans > 0).any(0).nonzero()[:, 0]
        last = int(columns[-1]) + 1 if len(columns) else 0
        if last > self.logical:
            raise ValueError(
                "the spans are inconsistent: an image is in columns that were not read"
            )
        return last

    def _image(self, image: Any) -> EarlierImage:
        """An entry of the header's list of images."""
        names = {"row", "image", "tokens", "kept"}
        if isinstance(image, dict) and set(image) == names:
            kept = image["kept"]
            share = isinstance(kept, float | int) and not isinstance(kept, bool)
            if (
                is_integer(image["row"], 0, self.rows - 1)
                and is_integer(image["image"], 1, MAX_COLUMN)
                and is_integer(image["tokens"], 1, MAX_COLUMN)
                and share
                and 0 <= kept <= 1  # neither NaN nor a number too large for a float
            ):
                return EarlierImage(**image)
        raise ValueError("the list of images is inconsistent")

    def _store(self, index: int, numbers: dict[str, Any], window: int | None, raw: bool) -> KVStore:
        """The keys and values of one layer."""
        end: int = numbers.get("end", 0)
        logical: int = numbers.get("logical", 0)
        fits = type(logical) is int and logical == self.logical
        if not fits or not is_integer(end, 1, self.logical):
            raise ValueError("the lengths in the header are inconsistent")
        start = self._tensor(f"{index}.start", (self.rows,), torch.int64)
        heads, dim, value = self.shapes.get(index, (None, None, None))
        keys = self._tensor(f"{index}.keys", (self.rows, heads or -1, end, dim or -1))
        values = self._tensor(f"{index}.values", (*keys.shape[:3], value or -1), keys.dtype)
        if self.header["format"] == 1:
            fits = keys.dtype in self.dtypes
        else:
            fits = numbers.get("dtype") == name_of(keys.dtype)
        if not fits or not keys.is_floating_point() or 0 in (*keys.shape, *values.shape):
            raise ValueError(f"keys of {name_of(keys.dtype)} do not fit the dtype of this model")
        if bool(((start < 0) | (start >= end)).any()):
            raise ValueError("the first slots of the rows are out of range")
        if raw and (end != logical or bool(start.any())):
            raise ValueError(
                "the lengths in the header are inconsistent: the header says that nothing was "
                "dropped"
            )
        store = KVStore(keys, values, window)
        if window is not None:
            name = f"{index}.positions"
            store.columns = self._tensor(name, tuple(keys.shape[:3]), torch.int32)
        store.start, store.ragged, store.logical = start, bool((start > 0).any()), self.logical
        return store

    def _home(
        self, index: int, numbers: dict[str, Any], store: KVStore, parks: bool
    ) -> Home | None:
        """The home of one layer, None if it has no parked tokens."""
        parked = numbers.get("parked")
        wanted = parks and self.vision is not None and self.vision.most > 0
        if not wanted or self.vision is None or self.recall is None:
            if parked is not None:
                raise ValueError(
                    "the header says that tokens are parked, but this layer parks none"
                )
            return None
        if not isinstance(parked, dict):
            raise ValueError("the header does not describe the parked tokens")
        own = self._parked(index)
        saved = from_format_1(own, parked) if self.header["format"] == 1 else Saved(own, parked)
        return HOMES[self.recall.home].restored(saved, self.recall, store, self.vision.spans)

    def _parked(self, index: int) -> dict[str, Tensor]:
        """The parked tensors of one layer, by their names without the layer."""
        prefix = f"{index}.{PARKED}"
        names = [name for name in self.tensors if name.startswith(prefix)]
        self.read.update(names)
        return {name.removeprefix(prefix): self.tensors[name] for name in names}

    def _codes(
        self, index: int, numbers: dict[str, Any], store: KVStore, parks: bool
    ) -> KeptCodes | None:
        """The kept codes of one layer, None if it has none."""
        if self.kept is None or not parks or numbers.get("parked") is None:
            return None
        return KeptCodes.restored(Saved(self._parked(index)), self.kept, store)

    def _check_slots(self, store: KVStore, home: Home | None, raw: bool) -> None:
        """Check the number of slots and the columns in them, as far as the spans determine them."""
        lengths, vision = store.end - store.start, self.vision
        text_only = home is None and not raw
        if text_only and vision is not None and not torch.equal(lengths, vision.text(self.logical)):
            raise ValueError("the slots do not fit the spans: a text token is missing")
        if store.columns is None:
            return
        for row, start in enumerate(store.start.tolist()):
            columns = store.columns[row, :, start:].long()
            if self.vision is not None and not raw:
                known = self.vision.text_columns(row, self.logical).expand(len(columns), -1)
                if home is not None:
                    known = torch.cat([home.slot_columns(store, row), known], 1)
                fits = torch.equal(columns, known)
            else:
                steps = columns[:, 1:] - columns[:, :-1]
                fits = bool((columns[:, 0] >= 0).all()) and bool((steps > 0).all())
                fits = fits and int(columns.max()) < self.logical
            if not fits:
                raise ValueError("the columns of the slots are inconsistent")


def is_integer(value: Any, lowest: int, highest: int) -> bool:
    """Whether a value of a header is an integer in a range."""
    return type(value) is int and lowest <= value <= highest
