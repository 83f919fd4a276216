"""Every image-text-to-text class of transformers with the config that it has by default.

What doctor says of it is held against transformers' own cache, filled by the model itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache

import plphp
from plphp.cli.diagnosis import Diagnosis, diagnose
from plphp.hf import compat

TEXT = 64
LAYERS = 6  # of a shrunk model: the patterns of windows repeat after 4 to 6


@dataclass(frozen=True)
class Held:
    """doctor's diagnosis and bytes beside what the model's cache really holds.

    real: bytes of keys and values, None where `unread` says why there is no such cache
    """

    found: Diagnosis | None
    refused: str
    real: int | None
    other: int | None
    unread: str

    @property
    def ratio(self) -> float | None:
        if self.found is None or self.found.full is None or not self.real:
            return None
        return self.found.full / self.real


def names() -> list[str]:
    mapping = AutoModelForImageTextToText._model_mapping
    return sorted(name for name in mapping._model_mapping if name in mapping._config_mapping)


def shrunk(name: str) -> Any:
    """The default config with a few layers: lists with an entry a layer are cut like the layers.

    As it is, where such a cut does not make a config that the class takes.
    """
    config = AutoConfig.for_model(name)
    raw = config.to_dict()
    deepest = getattr(config.get_text_config(decoder=True), "num_hidden_layers", LAYERS)
    for part in _parts(raw):
        for key, value in part.items():
            if key == "per_layer_config" and isinstance(value, dict):
                part[key] = {layer: own for layer, own in value.items() if int(layer) < LAYERS}
            elif isinstance(value, list) and len(value) == deepest:
                part[key] = value[:LAYERS]
            elif key in ("num_hidden_layers", "depth") and isinstance(value, int):
                part[key] = min(value, LAYERS)
    try:
        return type(config).from_dict(raw)
    except Exception:  # of all kinds: each config class checks its own fields
        return config


def _parts(raw: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
    yield raw
    for value in list(raw.values()):
        if isinstance(value, dict):
            yield from _parts(value)


def held(name: str, config: Any, length: int) -> Held:
    """Ask doctor, then the model, about a prompt of so many tokens."""
    found, refused = None, ""
    try:
        found = diagnose(name, config, plphp.PLPHP(), "bfloat16", 1, length - TEXT, TEXT)
    except plphp.PlphpError as error:
        refused = str(error)
    try:
        layers = read(copy.deepcopy(config), length)
    except Exception as error:  # what transformers raises for its own defaults is its own affair
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return Held(found, refused, None, None, f"{type(error).__name__}: {reason}")
    kv = other = 0
    for layer in layers:
        for attribute, tensor in _tensors(layer):
            if "indexer" in attribute or not attribute.endswith(("keys", "values")):
                other += tensor.numel() * tensor.element_size()
            else:
                kv += tensor.numel() * tensor.element_size()
    return Held(found, refused, kv, other, "")


def read(config: Any, length: int) -> list[Any]:
    """The layers of transformers' own cache after a prompt, on the meta device."""
    with torch.device("meta"), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).eval()
        cache = DynamicCache(config=config.get_text_config(decoder=True))
        ids = torch.zeros((1, length), dtype=torch.long)
        name = compat.cache_keyword(type(model).forward) or compat.CACHE
        try:
            model(input_ids=ids, use_cache=True, **{name: cache})
        except AttributeError as error:
            if "image_outputs" not in str(error):  # Llama 4 has read the prompt by then
                raise
    return list(cache.layers)


def _tensors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for attribute, value in vars(layer).items():
        for part in value.values() if isinstance(value, dict) else [value]:
            if isinstance(part, torch.Tensor) and part.dim() > 0:
                yield attribute, part
