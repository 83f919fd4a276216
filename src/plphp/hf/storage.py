"""A conversation's cache on disk: safetensors with a checked header, never pickle."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plphp.cache import KVStore
from plphp.errors import InputError, UnsupportedModeError
from plphp.hf.cache import PrunedCache
from plphp.hf.layer import PrunedLayer
from plphp.hf.report import images_found
from plphp.recall import Home, Recall, restored, state
from plphp.report import EarlierImage

FORMAT = 1
PARKED = "parked."


def save_cache(cache: PrunedCache, path: str | os.PathLike[str]) -> None:
    """Write what a cache holds, slack left out. The file appears only when it is whole.

    Raises UnsupportedModeError for a cache in the middle of a forward, or with layers that pruning
    left to transformers.
    """
    cache.check()
    tensors: dict[str, Tensor] = {}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, PrunedLayer):
            raise UnsupportedModeError(
                f"layer {index} was left to transformers; such a cache cannot be saved"
            )
        store = layer.store
        if not isinstance(store, KVStore):
            what = "is empty" if store is None else "is static"
            raise UnsupportedModeError(f"the cache {what}: it cannot be saved")
        keys, values = store.held()
        held = {"keys": keys, "values": values, "start": store.start}
        if store.positions is not None:
            held["positions"] = store.positions[..., : store.end]
        # Contiguous copies: neither slack nor what a view hides goes to disk.
        tensors |= {f"{index}.{name}": t.contiguous() for name, t in held.items()}
        numbers = {name: getattr(store, name) for name in ("end", "logical", "window")}
        layers.append({**numbers, "raw": layer.raw, "parked": None})
        if layer.parked is not None:
            parked, layers[-1]["parked"] = state(layer.parked)
            tensors |= {f"{index}.{PARKED}{name}": t for name, t in parked.items()}
    for name, tensor in (("shift", cache.shift), ("spans", cache.shared.spans)):
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    header = {
        "format": FORMAT,
        "model_type": cache.config.model_type,
        "last_image": cache.shared.last_image,
        "recall": _said(cache.shared.recall),
        "images": [asdict(image) for image in images_found(cache)],
        "layers": layers,
    }
    target = Path(path)
    part = target.with_name(target.name + ".part")
    save_file(tensors, part, metadata={"plphp": json.dumps(header)})
    os.replace(part, target)


def load_cache(model: Any, path: str | os.PathLike[str]) -> PrunedCache:
    """Read a cache for an attached model. Raises InputError for what does not fit the model."""
    cache = PrunedCache(model)
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("plphp", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a saved plphp cache: {error}") from error
    _check_header(cache, header, path)
    device = next(model.parameters()).device
    for index, numbers in enumerate(header["layers"]):
        layer = cache.layers[index]
        layer.store = store = _store(tensors, index, numbers, cache.config, path)
        layer.parked = _parked(tensors, index, numbers, cache.shared.recall, store, path)
        store.to(device)
        if layer.parked is not None:
            layer.parked.move(device)
        layer.raw, layer.is_initialized = bool(numbers["raw"]), True
    shift, spans = (tensors.get(name) for name in ("shift", "spans"))
    cache.shift = None if shift is None else shift.to(device)
    cache.shared.spans = None if spans is None else spans.to(device)
    cache.shared.last_image = int(header["last_image"])
    cache._found = tuple(EarlierImage(**image) for image in header.get("images", []))
    cache.check()
    return cache


def _check_header(cache: PrunedCache, header: dict[str, Any], path: Any) -> None:
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is not a plphp cache of format {FORMAT}")
    if header.get("model_type") != cache.config.model_type:
        raise InputError(
            f"{path} belongs to a {header.get('model_type')!r} model, this one is "
            f"{cache.config.model_type!r}"
        )
    recall = header.get("recall")
    if recall != _said(cache.shared.recall):
        options = ", ".join(f"{name}={value!r}" for name, value in (recall or {}).items())
        how = f"with recall=plphp.Recall({options})" if recall else "without recall"
        raise InputError(f"{path} was saved {how}: attach the model like that to read it")
    layers = header.get("layers", [])
    if len(layers) != len(cache.layers):
        raise InputError(f"{path} has {len(layers)} layers, the model has {len(cache.layers)}")
    windows = [getattr(layer, "window", None) for layer in cache.layers]
    if [numbers.get("window") for numbers in layers] != windows:
        raise InputError(f"{path} was made with other attention windows than the model's")


def _said(recall: Recall | None) -> dict[str, Any] | None:
    """What recall was asked for, as a header says it."""
    return None if recall is None else asdict(recall)


def _parked(
    tensors: dict[str, Tensor],
    index: int,
    numbers: dict[str, Any],
    recall: Recall | None,
    store: KVStore,
    path: Any,
) -> Home | None:
    """One layer's parked tokens, None where nothing was."""
    if numbers.get("parked") is None or recall is None:
        return None
    begin = f"{index}.{PARKED}"
    own = {n.removeprefix(begin): t for n, t in tensors.items() if n.startswith(begin)}
    try:
        return restored(recall, own, numbers["parked"], store)
    except ValueError as error:
        raise InputError(f"{path}, layer {index}: {error}") from error


def _store(
    tensors: dict[str, Tensor], index: int, numbers: dict[str, Any], config: Any, path: Any
) -> KVStore:
    """One layer, after its shapes and numbers have been checked against each other."""

    def wrong(what: str) -> InputError:
        return InputError(f"{path}, layer {index}: {what}; the file is damaged or not this model's")

    try:
        keys, values, start = (tensors[f"{index}.{name}"] for name in ("keys", "values", "start"))
    except KeyError as error:
        raise wrong(f"{error} is missing") from error
    end, logical = numbers.get("end"), numbers.get("logical")
    if not isinstance(end, int) or not isinstance(logical, int) or not 0 < end <= logical:
        raise wrong("its lengths make no sense")
    if keys.dim() != 4 or keys.shape[:3] != values.shape[:3] or keys.shape[2] != end:
        raise wrong(f"keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if keys.shape[1] != heads or keys.dtype != values.dtype or not keys.is_floating_point():
        raise wrong(f"{keys.shape[1]} KV heads of {keys.dtype}, the model has {heads}")
    if start.shape != keys.shape[:1] or bool(((start < 0) | (start >= end)).any()):
        raise wrong("its row starts make no sense")
    store = KVStore(keys, values, numbers.get("window"))
    if store.window is not None:
        positions = tensors.get(f"{index}.positions")
        if positions is None or positions.shape != keys.shape[:3]:
            raise wrong("positions are missing")
        store.positions = positions
    store.start, store.ragged, store.logical = start, bool((start > 0).any()), logical
    return store
