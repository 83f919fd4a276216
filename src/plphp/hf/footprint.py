"""Measures the bytes of transformers' own cache for a prompt, on the meta device without memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from plphp.errors import InputError, UnsupportedModelError
from plphp.hf import compat, stock

PROBE = 8  # tokens of the short prompt from which the shapes of keys and values are taken
# Layers whose size after any prompt follows from the shapes of keys and values alone.
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
STATES = ("conv_states", "recurrent_states")
PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer of transformers' own cache after a prompt of one row.

    kv: bytes of keys and values
    other: bytes of other tensors, such as the states of a linear layer
    token: bytes of the keys and values of one token
    """

    kv: int = 0
    other: int = 0
    token: int = 0


class Deadline(TorchFunctionMode):
    """Raises InputError in the first torch call after a number of seconds."""

    def __init__(self, seconds: float, what: str) -> None:
        super().__init__()
        self.seconds, self.what = seconds, what
        self.end = time.monotonic() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.monotonic() > self.end:
            raise InputError(
                f"{self.what} takes more than {self.seconds:.0f} seconds, because the sizes in its "
                "config are very large: correct them, or ask about a shorter prompt"
            )
        return func(*args, **(kwargs or {}))


def footprint(model: nn.Module, length: int) -> tuple[Footprint, ...]:
    """The bytes of each layer of transformers' own cache after a prompt of one row.

    model: on the meta device
    length: number of tokens in the prompt

    The model reads a short prompt, and new cache layers are given keys and values of the same
    shapes for `length` tokens. If some layer is of a kind where that is not enough, the model reads
    the whole prompt. Raises UnsupportedModelError if its forward does not run on the meta device.
    """
    if length < 1:
        return tuple(Footprint() for _ in compat.layer_windows(compat.text_config(model)))
    layers = _read(model, min(PROBE, length)).layers
    fresh = DynamicCache(config=compat.text_config(model)).layers
    if len(layers) != len(fresh) or not all(_is_simple(layer) for layer in layers):
        return tuple(_held(layer) for layer in _read(model, length).layers)
    for index, layer in enumerate(layers):
        if type(layer) in PLAIN and layer.keys is not None:
            fresh[index].update(*(_stretched(t, length) for t in (layer.keys, layer.values)))
        else:
            fresh[index] = layer
    return tuple(_held(layer) for layer in fresh)


def _read(model: nn.Module, tokens: int) -> Any:
    """transformers' own cache after a prompt of this many tokens."""
    refused = ""
    for call in _ways(model, tokens):
        cache = DynamicCache(config=compat.text_config(model))
        try:
            with torch.no_grad(), torch.device("meta"):
                call(cache)
            return cache
        except InputError:
            raise
        except Exception as error:
            # If only a module after the decoder failed, such as a head that needs an output of the
            # vision tower, the cache is complete.
            if all(_is_filled(layer) for layer in cache.layers):
                return cache
            refused = refused or f"{type(error).__name__}: {_first_line(error)}"
    raise UnsupportedModelError(
        f"its cache cannot be measured, because the model's forward does not run without weights "
        f"and images ({refused})"
    )


def _ways(model: Any, tokens: int) -> Iterator[Callable[[Any], Any]]:
    """Functions that fill a cache: with the whole model, its decoder, or its projections only."""
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    decoder = _decoder(model)
    for module in (model, decoder):
        name = None if module is None else compat.cache_keyword(type(module).forward)
        if name is not None:
            yield _call(module, {name: None, "input_ids": ids, "use_cache": True}, name)
    config = compat.text_config(model)
    pairs = {i: _projections(m) for i, m in compat.attention_modules(model, config).items()}
    if pairs and all(pairs.values()):
        yield lambda cache: _project(cache, pairs, tokens, model.dtype)


def _call(module: Any, options: dict[str, Any], name: str) -> Callable[[Any], Any]:
    """A function that calls a module with a cache. name: the keyword of the cache."""
    return lambda cache: module(**(options | {name: cache}))


def _projections(module: nn.Module) -> tuple[int, ...]:
    """The output sizes of the key and the value projection of a module, () if it has none."""
    pair = [getattr(getattr(module, name, None), "out_features", None) for name in PROJECTIONS]
    return tuple(int(n) for n in pair if n) if all(pair) else ()


def _project(
    cache: Any, pairs: dict[int, tuple[int, ...]], tokens: int, dtype: torch.dtype
) -> None:
    """Fill plain cache layers from the output sizes of projections, where no forward runs.

    All heads are written as one, which takes the same bytes. Raises TypeError for other layers.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) not in PLAIN or index not in pairs:
            raise TypeError(f"layer {index} is a {type(layer).__name__}")
        keys, values = (torch.empty(1, 1, tokens, n, dtype=dtype) for n in pairs[index])
        layer.update(keys, values)


def _decoder(model: Any) -> Any:
    """The language model inside a vision-language model, None if it does not name one."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    return None if decoder is model else decoder


def _stretched(states: Tensor, length: int) -> Tensor:
    """An empty tensor (B, H, length, D) like the keys or values of a short prompt."""
    return states.new_empty((*states.shape[:-2], length, states.shape[-1]))


def _is_simple(layer: Any) -> bool:
    """Whether the size of a layer after any prompt follows from a short prompt."""
    if type(layer) in PLAIN:
        return True
    return all(name.startswith(STATES) for name, _ in stock.named_tensors(layer))


def _is_filled(layer: Any) -> bool:
    """Whether a forward has written to a layer, or never writes to it."""
    dummy = not hasattr(layer, "keys") and not hasattr(layer, STATES[0])
    empty = getattr(layer, "is_initialized", None) and not stock.named_tensors(layer)
    return dummy or bool(empty) or bool(stock.named_tensors(layer))


def _held(layer: Any) -> Footprint:
    """The bytes of a layer."""
    kv = other = token = 0
    for name, tensor in stock.named_tensors(layer):
        if stock.is_kv(name):
            kv += tensor.nbytes
            if tensor.dim() > 1:  # a tensor that was never written to has one dimension
                token += tensor.nbytes // max(tensor.shape[-2], 1)
        else:
            other += tensor.nbytes
    return Footprint(kv, other, token)


def _first_line(error: Exception) -> str:
    """The first line of an error's message, at most 200 characters."""
    return " ".join((str(error).strip() or "no message").splitlines()[0].split())[:200]


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """Context in which models are built and run on the meta device, for a limited time.

    Raises InputError after `seconds` seconds. what: subject of its message
    """
    with Deadline(seconds, what), torch.device("meta"):
        yield
