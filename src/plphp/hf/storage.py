"""Saves the cache of a conversation to a file, and loads it.

When a file is read, every name, shape, dtype, count and range is checked.

The format is described in docs/caches.md; the file itself is read and written in `cache_file`.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from torch import Tensor

from plphp.cache import KVStore
from plphp.errors import InputError, UnsupportedModeError
from plphp.hf.cache_file import check_whole, read_file, short, write_file
from plphp.hf.conversation import Conversation
from plphp.hf.fingerprint import differences, fingerprint, name_of
from plphp.hf.layer import PrunedLayer
from plphp.hf.report import images_found
from plphp.hf.stored import PARKED, Stored
from plphp.policy import sequence_stage
from plphp.recall import KeptBits, Recall


def save_cache(cache: Conversation, path: str | os.PathLike[str]) -> None:
    """Write a cache to a file, without slack. The file appears only when it is complete.

    Raises UnsupportedModeError for a static or an empty cache, for one in the middle of a forward
    and for one with layers that are not pruned; InputError for a path that cannot be written.
    """
    cache.check()
    if cache.shared.recall is not None and sequence_stage(cache.shared.policy) is not None:
        raise UnsupportedModeError(
            "a cache with recall after a sequence method cannot be saved: save one without recall"
        )
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PrunedLayer):
            raise UnsupportedModeError(
                f"layer {index} is left to transformers: a cache with such a layer cannot be saved"
            )
        store = layer.store
        if not isinstance(store, KVStore):
            state = "is empty" if store is None else "is static"
            raise UnsupportedModeError(f"the cache {state}: it cannot be saved")
        keys, values = store.held()
        of_layer = {"keys": keys, "values": values, "start": store.start}
        if store.columns is not None:
            of_layer["positions"] = store.columns[..., : store.end]
        numbers: dict[str, Any] = {n: getattr(store, n) for n in ("end", "logical", "window")}
        numbers |= {"raw": layer.raw, "dtype": name_of(keys.dtype), "parked": None}
        part = layer.parked or layer.codes
        if part is not None:
            saved = part.saved()
            of_layer |= {f"{PARKED}{name}": tensor for name, tensor in saved.tensors.items()}
            numbers["parked"] = dict(saved.numbers)
        tensors |= {f"{index}.{name}": tensor for name, tensor in of_layer.items()}
        layers.append(numbers)
    for name, tensor in (("shift", cache.shift), ("spans", cache.shared.spans)):
        if tensor is not None:
            tensors[name] = tensor
    header = {
        "model_type": cache.config.model_type,
        "model": fingerprint(cache.config, cache._model()),
        "last_image": cache.shared.last_image,
        "recall": _options(cache.shared.recall),
        **_bits(cache.shared.kept),
        "images": [asdict(image) for image in images_found(cache)],
        "layers": layers,
    }
    # Contiguous copies, because a view would be written with its whole storage, slack included.
    write_file(path, header, {name: x.contiguous().cpu() for name, x in tensors.items()})


def load_into(cache: Conversation, model: Any, path: str | os.PathLike[str]) -> None:
    """Read a file into a new cache of an attached model, onto the model's device.

    Raises InputError for a file that cannot be read, is damaged or does not fit the model.
    """
    header, tensors = read_file(path, most=16 * len(cache.layers) + 8)
    try:
        stored = Stored(model, header, tensors, _checked_layers(cache, header))
        stored.common(cache)
        for index, layer in enumerate(cache.layers):
            stored.layer(index, layer, index in cache.shared.prunable)
        stored.check_names()
        check_whole(header, tensors)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error
    device = next(model.parameters()).device
    for _, layer in cache.pruned_layers():
        assert isinstance(layer.store, KVStore)
        layer.store.to(device)
        for part in (layer.parked, layer.codes):
            if part is not None:
                part.move(device)
    assert cache.shift is not None
    cache.shift = cache.shift.to(device)
    spans = cache.shared.spans
    cache.shared.spans = None if spans is None else spans.to(device)


def _bits(kept: KeptBits | None) -> dict[str, Any]:
    """The options of kept codes, as in a header, which names them only if there are any."""
    return {} if kept is None else {"codes": asdict(kept)}


def _options(recall: Recall | None) -> dict[str, Any] | None:
    """The options of recall, as in a header."""
    return None if recall is None else asdict(recall)


def _checked_layers(cache: Conversation, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of a header for the layers.

    Raises InputError if the cache belongs to another model, or to one attached in another way.
    """
    kind = header.get("model_type")
    if kind != cache.config.model_type:
        raise InputError(
            f"the file belongs to a model of type {short(kind)}, and this model is of type "
            f"{cache.config.model_type!r}"
        )
    if header["format"] != 1:
        saved, model = header.get("model"), fingerprint(cache.config, cache._model())
        if not isinstance(saved, dict):
            raise InputError("the file does not say which model it belongs to")
        for name in differences(saved, model):
            raise InputError(
                f"the file belongs to another model: {name} is {short(saved.get(name))} in the "
                f"file, and {short(model[name])} in this model"
            )
    recall = header.get("recall")
    if recall != _options(cache.shared.recall):
        how = "without recall"
        if isinstance(recall, dict) and recall:
            options = (f"{name[:20]}={short(value)}" for name, value in recall.items())
            how = f"with recall=plphp.Recall({', '.join(options)})"
        how = how if len(how) < 200 else f"{how[:200]}..."
        raise InputError(f"the file was saved {how}: attach the model in the same way to load it")
    if header.get("codes") != _bits(cache.shared.kept).get("codes"):
        made = short(header.get("codes") or "no kv_bits")
        raise InputError(f"the file was saved with {made}: attach the model in the same way")
    layers = header.get("layers")
    if not isinstance(layers, list) or not all(isinstance(numbers, dict) for numbers in layers):
        raise InputError("the header has no list of the layers")
    if len(layers) != len(cache.layers):
        raise InputError(f"the file has {len(layers)} layers, and the model {len(cache.layers)}")
    windows = [getattr(layer, "window", None) for layer in cache.layers]
    if [numbers.get("window") for numbers in layers] != windows:
        raise InputError("the file was made with other attention windows than the model has")
    return layers
