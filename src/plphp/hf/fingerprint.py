"""Which model a saved conversation belongs to: what its keys and values depend on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from plphp.hf import compat
from plphp.hf.cache_file import crc_of

# Of the language model's config; what a config lacks is None.
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
ROWS, NUMBERS = 64, 16  # of the input embeddings, spread over the vocabulary


def fingerprint(config: Any, model: Any | None) -> dict[str, Any]:
    """JSON values by name: the config's, the attention windows, the dtype, a sample of the weights.

    config: of the language model; model: the whole one, None where it is gone
    "weights" is a CRC-32 of 1,024 numbers of the input embeddings. It and "dtype" are None, and
    then not compared, where these are not at hand: offloaded, sharded, quantised.
    """
    found = {name: compat.config_value(config, name) for name in NAMES}
    found["windows"] = compat.layer_windows(config)
    table = None if model is None else _embeddings(model)
    found["dtype"] = None if table is None else name_of(table.dtype)
    found["weights"] = None if table is None else _sample(table)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str, sort_keys=True))
    return plain


def differences(saved: Mapping[str, Any], model: Mapping[str, Any]) -> Iterator[str]:
    """The names of what is not the same in both."""
    for name, own in model.items():
        if name in ("dtype", "weights") and (own is None or saved.get(name) is None):
            continue
        if name not in saved or saved[name] != own:
            yield name


def dtypes_of(model: Any) -> set[torch.dtype]:
    """The dtypes that a model's keys and values may have, autocast as it is now."""
    table = _embeddings(model)
    found = {model.dtype if table is None else table.dtype, model.dtype}
    device = model.device.type
    if torch.is_autocast_enabled(device):
        found.add(torch.get_autocast_dtype(device))
    return found


def name_of(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


Shape = tuple[int | None, int | None, int | None]


def layer_shapes(model: Any) -> dict[int, Shape]:
    """KV heads and the numbers of a key and of a value of every layer, None where unknown.

    Layers of one model may differ, so each attention module is asked, not the config.
    """
    config, found = compat.text_config(model), {}
    layers = compat.layer_configs(config)
    for index, module in compat.attention_modules(model, config).items():
        groups, heads = getattr(module, "num_key_value_groups", None), None
        if isinstance(groups, int) and groups > 0 and compat.over_ranks(model) is None:
            heads = layers[index % len(layers)].num_attention_heads // groups
        latent, dim = getattr(module, "qk_head_dim", None), getattr(module, "head_dim", None)
        value = getattr(module, "v_head_dim", None if latent else dim)
        found[index] = (heads, latent or dim, value)
    return found


def _embeddings(model: Any) -> Tensor | None:
    """The input embeddings (vocabulary, D), None where they are no plain tensor at hand."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    table = table.detach() if isinstance(table, Tensor) else None
    plain = type(table) is Tensor and not table.is_meta and table.is_floating_point()
    return table if plain and table is not None and table.dim() == 2 and len(table) else None


def _sample(table: Tensor) -> str:
    step = max(len(table) // ROWS, 1)
    return f"{crc_of(table[::step, :NUMBERS].contiguous().cpu()):08x}"
