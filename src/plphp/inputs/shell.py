"""Builds models without weights from a config, and refuses configs that cannot be built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from plphp.errors import InputError, UnsupportedModelError
from plphp.models import describes_vision

MOST_LAYERS = 1000  # the deepest language models that are published have about 130
COUNTS = ("depth", "depths", "n_layer", "n_layers", "num_layers", "layer_types")

TEXT_ALONE = (
    "{} is not a vision-language model that transformers knows; if you put images into its input "
    "embeddings, plphp.prune in Python takes vision_mask=..., with 0 for text and i for image i"
)


def check_depth(name: str, raw: dict[str, Any]) -> None:
    """Raise InputError for a config with more layers than any published model has.

    raw: the config as a dict, as in config.json. The check comes first, because transformers makes
    a list entry or a module for each layer while it reads the config.
    """
    for key, count in _counts(raw):
        if count > MOST_LAYERS:
            raise InputError(
                f"cannot read {name}: {key} in its config.json is {count:,}, and plphp reads "
                f"models of at most {MOST_LAYERS:,} layers: correct {key}"
            )


def _counts(raw: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Each key of a config, and of the configs inside it, that gives a number of layers."""
    left: list[Any] = [raw]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        if not isinstance(part, dict):
            continue
        for key, value in part.items():
            if isinstance(value, list) and (_counts_layers(key) or _lists_layers(key)):
                yield key, max([len(value), *(v for v in value if _is_count(v))])
            elif _is_count(value) and _counts_layers(key):
                yield key, value
            if isinstance(value, dict | list):
                left.append(value)


def _counts_layers(key: str) -> bool:
    return key in COUNTS or (key.endswith("layers") and "per_layer" not in key)


def _lists_layers(key: str) -> bool:
    return key.endswith(("layer_types", "_pattern", "per_layer"))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def shell(config: Any, trust: bool = False, dtype: Any = None) -> Any:
    """Build the model of a config without weights. Call this with "meta" as torch's device.

    trust: whether Python code that comes with the model may run, if transformers has no class for
        the model
    dtype: the dtype of the weights, None for the config's own

    Raises UnsupportedModelError for a model that does not generate text, and InputError if no
    model can be built from the config.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    own = getattr(config, "auto_map", None) or {}
    kinds = (AutoModelForImageTextToText, AutoModelForCausalLM)
    for auto in kinds:
        if type(config) in auto._model_mapping:
            return _built(auto, config, False, dtype)
    remote = [auto for auto in (*kinds, AutoModel) if auto.__name__ in own]
    if remote and trust:
        return _built(remote[0], config, True, dtype)
    if remote:
        raise UnsupportedModelError(
            f"{config.model_type} needs its own Python code: give --trust-remote-code to run it"
        )
    raise UnsupportedModelError(
        f"{config.model_type} is not a vision-language model that transformers can generate with"
    )


def is_text_alone(config: Any) -> bool:
    """Whether transformers knows a model of this config, and it reads no images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    with_images, of_text = (
        type(config) in auto._model_mapping
        for auto in (AutoModelForImageTextToText, AutoModelForCausalLM)
    )
    return of_text and not with_images and not describes_vision(config)


def _built(auto: Any, config: Any, trust: bool, dtype: Any) -> Any:
    options = {} if dtype is None else {"dtype": dtype}
    try:
        return auto.from_config(config, trust_remote_code=trust, **options).eval()
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"cannot build {config.model_type}: {_line(error)}") from error
    except Exception as error:
        raise InputError(
            f"cannot build {config.model_type} from its config ({type(error).__name__}: "
            f"{_line(error)}): check the sizes in its config.json, and whether fields are missing"
        ) from error


def _line(error: Exception) -> str:
    return " ".join((str(error).strip() or "no message").splitlines()[0].split())[:200]
