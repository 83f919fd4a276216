"""What plphp relies on in transformers, and what differs between its versions, in one place."""

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

from plphp.errors import UnsupportedModelError, UnsupportedTransformersError

OLDEST = Version("5.16")
TESTED = Version("5.24")  # the newest release line that the tests have seen
# What pyproject.toml asks for. A newer release is tried; `check_seam` says if it cannot work.
BOUNDS = f">={OLDEST},<{TESTED.major}.{TESTED.minor + 1}"
ATTENTION = "plphp"  # our name in transformers' public registry of attention functions
# The keyword that carries the cache was renamed in 5.24. An attached model accepts both names.
CACHE_NAMES = ("cache", "past_key_values")


def check_version() -> None:
    """Raise UnsupportedTransformersError where a seam is missing, whatever the version says."""
    found = Version(transformers.__version__)
    if found < OLDEST:
        raise UnsupportedTransformersError(
            f"plphp needs transformers {OLDEST} or newer, found {found}: "
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
                f"transformers {found} has no {owner.__name__}.{name}, which plphp attaches to; "
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
    """Raise UnsupportedTransformersError if transformers' own Llama has no seam to attach to.

    Called where a model turned out to have none, to tell a new version from an unusual model.
    """
    from transformers.models.llama.modeling_llama import LlamaAttention

    if not _has_seam(LlamaAttention):
        raise UnsupportedTransformersError(
            f"plphp knows transformers {OLDEST} to {TESTED}, and found no way to attach to "
            f"attention in {transformers.__version__}: pip install 'transformers{BOUNDS}'"
        )


def _has_seam(module: type[nn.Module]) -> bool:
    """Whether a module is given its cache by keyword and hands free keywords on."""
    parameters = inspect.signature(module.forward).parameters.values()
    return cache_keyword(module.forward) is not None and any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters
    )


def attention_modules(model: nn.Module, config: Any) -> dict[int, nn.Module]:
    """Layer index -> self-attention module of the text decoder.

    Found by what the seam needs: a layer index, a cache passed by keyword, a config that names the
    attention function, and free keyword arguments that reach that function.
    """
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or not hasattr(module, "is_causal"):
            continue
        if getattr(getattr(module, "config", None), "model_type", None) != config.model_type:
            continue
        if _has_seam(type(module)):
            found[index] = module
    return found


def _layer_kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Kind and options of every layer that has a cache of its own.

    Up to 5.19 the options are one dict for all layers; later releases have one a layer.
    """
    kinds, options = cache_utils.get_layer_types_and_kwargs(config)
    each = [options] * len(kinds) if isinstance(options, dict) else options
    return list(zip(kinds, each, strict=False))


def layer_windows(config: Any) -> list[int | str | None]:
    """For every cached layer: None (full attention), a sliding window, or another kind's name.

    Layers of another kind (linear, chunked, shared KV) cannot be pruned and are left alone.
    """
    windows: list[int | str | None] = []
    lent = _lenders(config)
    for index, (kind, options) in enumerate(_layer_kinds(config)):
        if index in lent:
            windows.append("shared_kv")
        elif kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            windows.append(int(options["sliding_window"]))
        else:
            windows.append(str(kind))
    return windows


def covers(window: int | str | None, prompt: int) -> TypeGuard[int | None]:
    """Whether a layer of `layer_windows` attends to all of a prompt, so that it can be pruned."""
    return window is None or (isinstance(window, int) and window >= prompt)


def _lenders(config: Any) -> set[int]:
    """Layers whose keys and values later layers attend to as well (Gemma 3n, Gemma 4).

    Those layers choose for themselves what they look at: what they borrow has to stay whole.
    """
    kinds = getattr(config, "layer_types", None) or []
    first = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    return {max(i for i in range(first) if kinds[i] == kind) for kind in kinds[first:]}


def held_tensors(layer: Any) -> list[Tensor]:
    """What one of transformers' own cache layers holds: keys and values, or states.

    Those of quantized layers come in pairs with their scales, some of them wrapped as one tensor.
    """
    found: list[Tensor] = []
    left = list(vars(layer).values())
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += value.values()
        elif isinstance(value, tuple | list):
            left += value
        elif is_traceable_wrapper_subclass(value):
            left += [getattr(value, name) for name in value.__tensor_flatten__()[0]]
        elif isinstance(value, Tensor):
            found.append(value)
    return found[::-1]


def is_recurrent(config: Any) -> bool:
    """Whether some layers keep a state in place of keys and values: no token can be taken back."""
    kind = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    return kind is not None and any(isinstance(layer, kind) for layer in stock_layers(config))


def stock_layers(config: Any) -> list[Any]:
    """The cache layers that transformers itself would use."""
    mapping = cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    return [mapping[kind](**options) for kind, options in _layer_kinds(config)]


def original_attention(module: nn.Module, config: Any) -> Callable[..., Any]:
    """The attention function that the module would call under its own config.

    `eager` is a function of the model's own file and in no registry.
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
    """The soft cap that the model's own attention function applies to its logits, if any.

    Up to 5.19 "sdpa" leaves it out without a word, so its users never had it; later it refuses.
    """
    cap: float | None = kwargs.get("softcap")
    return None if config.original._attn_implementation == "sdpa" else cap


def scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    """What the model multiplies its logits with. query (B, H, T, D)."""
    given = kwargs.get("scaling")
    return float(query.shape[-1] ** -0.5 if given is None else given)


def text_config(model: nn.Module) -> Any:
    """The config of the language model inside a vision-language model."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def layer_configs(config: Any) -> list[Any]:
    """The config of every decoder layer; one for all where the layers do not differ.

    Where layers differ (Gemma 4), such an attribute of `config` itself cannot be read.
    """
    return list(getattr(config, "per_layer_config", None) or [config])


def head_dim(config: Any) -> int:
    """Numbers of a key in one head, of a language model's or one layer's config; else the least."""
    return min(
        int(getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads)
        for one in layer_configs(config)
    )


def kv_heads(config: Any) -> list[int]:
    """KV heads of every decoder layer; one number where the layers do not differ."""
    return [
        int(getattr(one, "num_key_value_heads", None) or one.num_attention_heads)
        for one in layer_configs(config)
    ]


def register_attention(function: Callable[..., Any]) -> None:
    """Offer a stateless function under our name; only attached modules ask for it."""
    AttentionInterface.register(ATTENTION, function)


def over_ranks(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A mean over the tensor-parallel ranks of a model loaded with tp_plan, or None without.

    transformers keeps the mesh on the model; each rank holds an equal share of every layer's heads.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    part = mesh["tp"] if "tp" in names and mesh.ndim > 1 else mesh
    if part.ndim != 1 or part.size() == 1 or (names and "tp" not in names):
        return None
    group, size = part.get_group(), int(part.size())

    def mean(tensor: Tensor) -> Tensor:
        summed = tensor.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed / size

    return mean
