"""The parts of transformers that plphp relies on, and the differences between its versions."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import GenerationMixin, cache_utils
from transformers.modeling_utils import AttentionInterface

from plphp._installed import TESTED as RANGES
from plphp._installed import bounds
from plphp.errors import UnsupportedModelError, UnsupportedTransformersError

# A release newer than TESTED is tried; `check_seam` says if it cannot work.
OLDEST, TESTED = RANGES["transformers"]
BOUNDS = bounds("transformers")
ATTENTION = "plphp"  # plphp's name in transformers' registry of attention functions
# The keyword that carries the cache was renamed in 5.24. An attached model accepts both names.
CACHE_NAMES = ("cache", "past_key_values")


def check_version() -> None:
    """Raise UnsupportedTransformersError if transformers is too old, or lacks what plphp needs."""
    installed = Version(transformers.__version__)
    if installed < OLDEST:
        raise UnsupportedTransformersError(
            f"plphp needs transformers {OLDEST} or newer, found {installed}: "
            f"pip install 'transformers{BOUNDS}'"
        )
    for owner, name in (
        (AttentionInterface, "register"),
        (AttentionInterface, "get_interface"),
        (cache_utils, "CacheLayerMixin"),
        (cache_utils, "get_layer_types_and_kwargs"),
        (cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING"),
    ):
        if not hasattr(owner, name):
            raise UnsupportedTransformersError(
                f"transformers {installed} has no {owner.__name__}.{name}, which plphp needs: "
                f"pip install 'transformers{BOUNDS}'"
            )


def cache_keyword(function: Callable[..., Any]) -> str | None:
    """The name of the parameter of `function` that takes the cache, None if it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


# The name that generate() and the outputs of models use in the installed version.
CACHE = cache_keyword(GenerationMixin.prepare_inputs_for_generation) or CACHE_NAMES[0]


def given_cache(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or in the output of a model, under either name."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def with_cache(kwargs: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """The same keyword arguments with `cache` under the one name that the callee knows."""
    return {key: kwargs[key] for key in kwargs if key not in CACHE_NAMES} | {name: cache}


def check_seam() -> None:
    """Raise UnsupportedTransformersError if plphp cannot attach to transformers' own Llama.

    Called if plphp could not attach to a model: it tells whether transformers is too new, or the
    model unusual.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention

    if not _has_seam(LlamaAttention):
        raise UnsupportedTransformersError(
            f"plphp knows transformers {OLDEST} to {TESTED}, and found no way to attach to "
            f"attention in {transformers.__version__}: pip install 'transformers{BOUNDS}'"
        )


def _has_seam(module: type[nn.Module]) -> bool:
    """Whether plphp can attach to a class of attention modules.

    Its forward must take the cache by keyword, and further keywords for the attention function.
    """
    parameters = inspect.signature(module.forward).parameters.values()
    return cache_keyword(module.forward) is not None and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )


def attention_modules(model: nn.Module, config: Any) -> dict[int, nn.Module]:
    """Layer index -> self-attention module of the text decoder.

    A module counts if it has what plphp needs: a layer index, a cache passed by keyword, a config
    that names the attention function, and keyword arguments that reach that function.

    config: of the text decoder
    """
    modules: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not hasattr(module, "is_causal"):
            continue
        if getattr(getattr(module, "config", None), "model_type", None) != config.model_type:
            continue
        if _has_seam(type(module)):
            modules[index] = module
    return modules


def _layer_kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Kind and options of every layer in the cache.

    Up to transformers 5.19 all layers share one dict of options; later each layer has its own.
    """
    kinds, options = cache_utils.get_layer_types_and_kwargs(config)
    each = [options] * len(kinds) if isinstance(options, dict) else options
    return list(zip(kinds, each, strict=False))


def layer_windows(config: Any) -> list[int | str | None]:
    """The attention of every layer in the cache.

    None means full attention, a number the sliding window in tokens, and a text the name of any
    other kind (linear, chunked, keys and values shared with other layers), which is never pruned.
    """
    windows: list[int | str | None] = []
    shared = _layers_with_shared_keys(config)
    for index, (kind, options) in enumerate(_layer_kinds(config)):
        if index in shared:
            windows.append("shared_kv")
        elif kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            windows.append(int(options["sliding_window"]))
        else:
            windows.append(str(kind))
    return windows


def covers(window: int | str | None, prompt: int) -> TypeGuard[int | None]:
    """Whether a layer attends to all of a prompt, so that it can be pruned.

    window: as `layer_windows` returns it; prompt: number of columns
    """
    return window is None or (isinstance(window, int) and window >= prompt)


def _layers_with_shared_keys(config: Any) -> set[int]:
    """Layers whose keys and values later layers attend to as well (Gemma 3n, Gemma 4).

    They are not pruned, because the later layers may attend to other tokens than they do.
    """
    kinds = getattr(config, "layer_types", None) or []
    first = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {max(i for i in range(first) if kinds[i] == kind) for kind in kinds[first:]}


def held_tensors(layer: Any) -> list[Tensor]:
    """The tensors of one of transformers' own cache layers: keys and values, or states.

    Quantized layers hold them together with scales: in tuples, or inside one tensor subclass.
    """
    tensors: list[Tensor] = []
    values = list(vars(layer).values())
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, tuple | list):
            values += value
        elif is_traceable_wrapper_subclass(value):
            values += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor):
            tensors.append(value)
    return tensors[::-1]


def is_recurrent(config: Any) -> bool:
    """Whether some layers hold a recurrent state, from which no token can be removed again."""
    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    return kind is not None and any(isinstance(layer, kind) for layer in stock_layers(config))


def stock_layers(config: Any) -> list[Any]:
    """New cache layers, as transformers itself makes them for a model with this config."""
    mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    return [mapping[kind](**options) for kind, options in _layer_kinds(config)]


def original_attention(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that a module calls when it is not attached.

    config: the original one. "eager" names a function in the model's own file, which is in no
    registry. Raises UnsupportedModelError if the module does not use the attention interface.
    """
    name = config._attn_implementation
    file = sys.modules[type(module).__module__]
    eager = getattr(file, "eager_attention_forward", None)
    registry = getattr(file, "ALL_ATTENTION_FUNCTIONS", None)
    if registry is None or (name == "eager" and eager is None):
        raise UnsupportedModelError(
            f"{type(module).__name__} does not call transformers' attention interface, so plphp "
            "cannot see its queries and keys"
        )
    function: Callable[..., Any] = registry.get_interface(name, eager)
    return function


def softcap(config: Any, kwargs: dict[str, Any]) -> float | None:
    """The soft cap that the model's own attention function applies to its logits, or None.

    Up to transformers 5.19 "sdpa" ignores the soft cap silently, so it is ignored here too. Later
    versions raise an error.
    """
    cap: float | None = kwargs.get("softcap")
    return None if config.original._attn_implementation == "sdpa" else cap


def scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    """The factor of the attention logits. query (B, H, T, D)."""
    given = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if given is None else given)


def text_config(model: nn.Module) -> Any:
    """The config of the language model inside a vision-language model."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def layer_configs(config: Any) -> list[Any]:
    """The config of every decoder layer, or a single one if the layers do not differ.

    If they differ (Gemma 4), their attributes cannot be read from `config` itself.
    """
    return list(getattr(config, "per_layer_config", None) or [config])


def config_value(config: Any, name: str) -> Any:
    """An attribute of a language model's config, None if the config does not have it.

    If it differs between layers (Gemma 4), the list of the values of all layers.
    """
    values = [getattr(layer, name, None) for layer in layer_configs(config)]
    return values[0] if all(value == values[0] for value in values) else values


def head_dim(config: Any) -> int:
    """D, the size of a key in one head; the smallest if layers differ.

    config: of a language model, or of one layer
    """
    return min(
        int(getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads)
        for layer in layer_configs(config)
    )


def kv_heads(config: Any) -> list[int]:
    """Hkv of every decoder layer, or a single number if the layers do not differ."""
    return [
        int(getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads)
        for layer in layer_configs(config)
    ]


def register_attention(function: Callable[..., Any], name: str = ATTENTION) -> None:
    """Register an attention function under a name that only attached modules use."""
    AttentionInterface.register(name, function)


def over_ranks(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A function that averages a tensor over tensor-parallel ranks.

    None if the model was not loaded with tp_plan. transformers stores the device mesh on the model.
    Every rank holds equally many heads of each layer, so the mean of means is the mean.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    axis = mesh["tp"] if "tp" in names and mesh.ndim > 1 else mesh
    if axis.ndim != 1 or axis.size() == 1 or (names and "tp" not in names):
        return None
    group, size = axis.get_group(), int(axis.size())

    def mean(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed / size

    return mean
