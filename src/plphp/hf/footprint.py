"""What transformers' own cache takes for a prompt, measured without memory on the meta device."""

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

PROBE = 8  # tokens of the prompt that shows the shapes of keys and values
# Layers whose content after any prompt follows from the shapes of keys and values alone
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer)
STATES = ("conv_states", "recurrent_states")
PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Footprint:
    """What one layer of transformers' own cache holds after a prompt of one row, in bytes.

    kv: keys and values; other: what it keeps beside them, such as the states of a linear layer
    token: keys and values of one token
    """

    kv: int = 0
    other: int = 0
    token: int = 0


class Deadline(TorchFunctionMode):
    """Inside, no torch call is made after so many seconds: InputError is raised instead."""

    def __init__(self, seconds: float, what: str) -> None:
        super().__init__()
        self.seconds, self.what = seconds, what
        self.end = time.monotonic() + seconds

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.monotonic() > self.end:
            raise InputError(
                f"{self.what} takes more than {self.seconds:.0f} seconds: the sizes in its config "
                "are out of the ordinary; correct them, or ask about a shorter prompt"
            )
        return func(*args, **(kwargs or {}))


def footprint(model: nn.Module, length: int) -> tuple[Footprint, ...]:
    """The layers of transformers' own cache after `length` tokens, for a model on meta.

    A short prompt shows what every layer hands to its cache, and a fresh cache layer takes as much
    of it as the asked length has. Where a layer is of another kind, the model reads it all.
    Raises UnsupportedModelError where the model's forward does not run on the meta device.
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
    """transformers' own cache after a prompt of so many tokens."""
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
            # Such as a head that looks for an output of the vision tower: the cache is complete.
            if all(_is_filled(layer) for layer in cache.layers):
                return cache
            refused = refused or f"{type(error).__name__}: {_first_line(error)}"
    raise UnsupportedModelError(
        f"its forward does not run without weights and images, so that its cache cannot be "
        f"measured ({refused})"
    )


def _ways(model: Any, tokens: int) -> Iterator[Callable[[Any], Any]]:
    """Calls that fill a cache: the whole model with text, its decoder alone, its projections."""
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
    return lambda cache: module(**(options | {name: cache}))


def _projections(module: nn.Module) -> tuple[int, ...]:
    """Numbers that an attention module makes of a token for its keys and for its values."""
    pair = [getattr(getattr(module, name, None), "out_features", None) for name in PROJECTIONS]
    return tuple(int(n) for n in pair if n) if all(pair) else ()


def _project(
    cache: Any, pairs: dict[int, tuple[int, ...]], tokens: int, dtype: torch.dtype
) -> None:
    """Fill plain cache layers where no forward runs, such as for a config without its rotary part.

    Heads are not told apart: the bytes are the same. Raises TypeError for other layers.
    """
    for index, layer in enumerate(cache.layers):
        if type(layer) not in PLAIN or index not in pairs:
            raise TypeError(f"layer {index} is a {type(layer).__name__}")
        keys, values = (torch.empty(1, 1, tokens, n, dtype=dtype) for n in pairs[index])
        layer.update(keys, values)


def _decoder(model: Any) -> Any:
    """The language model inside a vision-language model, if it says which that is."""
    found = getattr(model, "get_decoder", lambda: None)()
    return None if found is model else found


def _stretched(states: Tensor, length: int) -> Tensor:
    """As many tokens (B, H, length, D) as were asked for, of a probe's keys or values."""
    return states.new_empty((*states.shape[:-2], length, states.shape[-1]))


def _is_simple(layer: Any) -> bool:
    """Whether the content of a layer after any prompt follows from what a short one left."""
    if type(layer) in PLAIN:
        return True
    return all(name.startswith(STATES) for name, _ in stock.named_tensors(layer))


def _is_filled(layer: Any) -> bool:
    dummy = not hasattr(layer, "keys") and not hasattr(layer, STATES[0])
    empty = getattr(layer, "is_initialized", None) and not stock.named_tensors(layer)
    return dummy or bool(empty) or bool(stock.named_tensors(layer))


def _held(layer: Any) -> Footprint:
    kv = other = token = 0
    for name, tensor in stock.named_tensors(layer):
        if stock.is_kv(name):
            kv += tensor.nbytes
            if tensor.dim() > 1:  # what nothing was written to has one dimension
                token += tensor.nbytes // max(tensor.shape[-2], 1)
        else:
            other += tensor.nbytes
    return Footprint(kv, other, token)


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or "no message").splitlines()[0].split())[:200]


@contextmanager
def bounded(seconds: float, what: str) -> Iterator[None]:
    """Build and read models on the meta device, for so many seconds at most.

    Raises InputError when the time is over.
    """
    with Deadline(seconds, what), torch.device("meta"):
        yield
