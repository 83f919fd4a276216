"""Identifies the model of a saved conversation, by what its keys and values depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from plphp.hf import compat
from plphp.hf.cache_file import crc_of

# Attributes of the language model's config. None stands for one that a config does not have.
NAMES = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rope_theta",
    "rope_parameters",
)
ROWS, NUMBERS = 64, 16  # sample of the input embeddings: rows of the vocabulary, numbers of each


def fingerprint(config: Any, model: Any | None) -> dict[str, Any]:
    """The properties of a model as JSON values: config, attention windows, dtype and weights.

    config: of the language model
    model: the whole model, None if it does not exist any more

    "weights" is a CRC-32 of 1,024 numbers of the input embeddings. "weights" and "dtype" are None,
    and are not compared then, if the embeddings are offloaded, sharded or quantised.
    """
    values = {name: compat.config_value(config, name) for name in NAMES}
    values["windows"] = compat.layer_windows(config)
    table = None if model is None else _embeddings(model)
    values["dtype"] = None if table is None else name_of(table.dtype)
    values["weights"] = None if table is None else _sample(table)
    in_json: dict[str, Any] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return in_json


def differences(saved: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """The names of the properties in which two fingerprints differ."""
    for name, value in model.items():
        if name in ("dtype", "weights") and (value is None or saved.get(name) is None):
            continue
        if name not in saved or saved[name] != value:
            yield name


def dtypes_of(model: Any) -> set[torch.dtype]:
    """The dtypes that the keys and values of a model may have, with the present autocast."""
    table = _embeddings(model)
    dtypes = {model.dtype if table is None else table.dtype, model.dtype}
    device = model.device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return dtypes


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


Shape = tuple[int | None, int | None, int | None]


def layer_shapes(model: Any) -> dict[int, Shape]:
    """Hkv, D and Dv of every layer, None where unknown.

    They are read from the attention modules and not from the config, since layers may differ.
    """
    config, shapes = compat.text_config(model), {}
    layers = compat.layer_configs(config)
    for index, module in compat.attention_modules(model, config).items():
        groups, heads = getattr(module, "num_key_value_groups", None), None
        if isinstance(groups, int) and groups > 0 and compat.over_ranks(model) is None:
            heads = layers[index % len(layers)].num_attention_heads // groups
        latent, dim = getattr(module, "qk_head_dim", None), getattr(module, "head_dim", None)
        value = getattr(module, "v_head_dim", None if latent else dim)
        shapes[index] = (heads, latent or dim, value)
    return shapes


def _embeddings(model: Any) -> Tensor | None:
    """The input embeddings (vocabulary, hidden size), None if they are no ordinary tensor."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    table = table.detach() if isinstance(table, Tensor) else None
    plain = type(table) is Tensor and not table.is_meta and table.is_floating_point()
    return table if plain and table is not None and table.dim() == 2 and len(table) else None


def _sample(table: Tensor) -> str:
    """CRC-32 of a few numbers from rows spread over the vocabulary, as 8 hexadecimal digits."""
    step = max(len(table) // ROWS, 1)
    return f"{crc_of(table[::step, :NUMBERS].contiguous().cpu()):08x}"
