"""Loads the model that a user names, together with its processor."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import constants as hub
from transformers.utils import logging as transformers_logging

from plphp._installed import (
    decoding_fault,
    has_torchvision,
    install_torchcodec,
    install_torchvision,
    misfit_behind,
)
from plphp.errors import InputError, PlphpError, UnsupportedModelError
from plphp.inputs.rounding import bits_of, frugal, loading_options, settle
from plphp.inputs.runnable import Loaded, Runnable
from plphp.inputs.shell import check_depth
from plphp.weights import Tell, check_complete, round_weights, warn

EMBEDDED = "embedded"
NEED_TORCHVISION = ("torchvision", "timm")  # pip would bring a torchvision, and another torch


def load(
    name: str,
    dtype: str,
    device: str,
    attention: str | None = None,
    trust: bool = False,
    weights: str | None = None,
    tell: Tell = warn,
) -> Runnable:
    """Load a model with its processor.

    name: "embedded", a local directory, or a hub id
    dtype: "float32", "bfloat16" or "float16"; "auto" takes the dtype of the weights
    device: a torch device. "auto" spreads the layers over all devices; the embedded model, which is
        small, gets one device
    attention: the attention implementation of transformers, None for the model's default
    trust: whether Python code that comes with the model may run
    weights: "int8" or "int4": round the weights while they are loaded, in bfloat16
    tell: is called with a remark on files that do not fit the model exactly

    Raises InputError that says what to do if the model cannot be loaded, or if its files lack
    weights.
    """
    spread = device == "auto" and name != EMBEDDED
    if device == "auto":
        device = "cuda" if name == EMBEDDED and torch.cuda.is_available() else "cpu"
    check_device(device)
    bits, dtype = bits_of(weights, device, dtype), "bfloat16" if weights else dtype
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == EMBEDDED:
        return _load_embedded(kind, device, attention, bits)
    from transformers import AutoModelForImageTextToText

    config = load_config(name, trust)
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": trust}
    options |= {"attn_implementation": attention} if attention else {}
    options |= {"device_map": "auto"} if spread else {}
    if bits:
        options |= loading_options(config, bits)
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) is not a vision-language model that transformers knows"
        )
    with _reading(name), frugal() if bits else nullcontext():
        made = _reader(name, config, trust)
        model = _complete(name, options, bits, tell)
        return made((model if spread else model.to(device)).eval())


def _complete(name: str, options: dict[str, Any], bits: int | None, tell: Tell) -> Any:
    """The model with all its weights. options: of `from_pretrained`; others as in `load`"""
    from transformers import AutoModelForImageTextToText

    model, found = AutoModelForImageTextToText.from_pretrained(
        name, output_loading_info=True, **options
    )
    if bits:
        settle(model)
    check_complete(name, model, found, tell)
    return model


def _load_embedded(kind: Any, device: str, attention: str | None, bits: int | None) -> Runnable:
    """The embedded model, in float32 if kind is "auto"."""
    from plphp.demo.model import load as load_embedded

    embedded = load_embedded(torch.float32 if kind == "auto" else kind, device)
    if attention:
        _set_attention(embedded.model, attention)
    if bits:
        round_weights(embedded.model, bits)
    return embedded


def without_weights(name: str, dtype: torch.dtype, trust: bool, config: Any) -> Runnable:
    """What makes the inputs of a model that is not loaded: its `model` has a config and no layers.

    name, trust: as in `load`; dtype: of pixels; config: what `load_config` returns for them. Raises
    InputError as `load`.
    """
    path = _path(name)
    stub = SimpleNamespace(config=config, device=torch.device("cpu"), dtype=dtype)
    stub.name_or_path = path
    with _reading(name):
        return _reader(path, config, trust)(stub)


def _reader(name: str, config: Any, trust: bool) -> Callable[[Any], Runnable]:
    """A function that joins a model with its processor, which is loaded now.

    A local Qwen2-VL is read with its image processor only: its video processor needs torchvision.
    """
    from transformers import AutoProcessor, AutoTokenizer, Qwen2VLImageProcessorPil

    from plphp.demo.model import Embedded

    if name != _path(EMBEDDED) and not pictures_alone(name, config):
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust)
        check_tokenizer(name, getattr(processor, "tokenizer", processor))
        return lambda model: Loaded(model, processor)
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    check_tokenizer(name, tokenizer)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(name, local_files_only=True)
    return lambda model: Embedded(model, tokenizer, pictures)


def check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise InputError for the empty tokenizer that transformers makes where its files are missing.

    name: of the model
    """
    special = getattr(tokenizer, "all_special_tokens", None)
    if special is not None and len(tokenizer) <= len(special):
        raise InputError(
            f"cannot load {name}: its tokenizer has no words: the files of the tokenizer, such as "
            "tokenizer.json, must be beside it"
        )


def _path(name: str) -> str:
    """The directory of the embedded model, and the name itself for others."""
    from plphp.demo.model import WEIGHTS

    return str(WEIGHTS) if name == EMBEDDED else name


def is_embedded(loaded: Runnable) -> bool:
    """Whether this is the model that comes with the package."""
    from plphp.demo.model import WEIGHTS

    return bool(loaded.model.name_or_path == str(WEIGHTS))


def load_config(name: str, trust: bool = False) -> Any:
    """The config of the model with this name. Raises InputError if there is no such model."""
    from transformers import AutoConfig, PreTrainedConfig

    name = _path(name)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} is a directory without a config.json, so it is not a model")
    if path.is_file():
        raise InputError(f"{name} is a file: --model takes a directory, a hub id, or 'embedded'")
    if name.startswith((".", "/", "~")) and not path.exists():
        raise InputError(f"{name}: no such directory")
    with _reading(name):
        check_depth(name, PreTrainedConfig.get_config_dict(name)[0])
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust)
        except (OSError, ValueError, ImportError, RecursionError):
            raise
        except Exception as error:  # each config class checks its fields and has its own errors
            raise InputError(
                f"cannot load {name}: the model does not accept its config.json "
                f"({first_sentence(error)}): correct the file"
            ) from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn the errors of transformers about a model that cannot be loaded into an InputError."""
    try:
        yield
    except (PlphpError, MemoryError, torch.OutOfMemoryError):
        raise
    except RecursionError as error:
        raise InputError(
            f"cannot load {name}: its config.json is nested too deeply: correct the file"
        ) from error
    except Exception as error:
        raise InputError(_refusal(name, error)) from error


def _refusal(name: str, error: Exception) -> str:
    """The message for an error of transformers.

    The message of the error may contain the name of the model, which may contain any word.
    Therefore the hub is only mentioned if the model is not on this machine.
    """
    away = isinstance(error, OSError) and ("connect" in str(error) or "offline" in str(error))
    if away and not Path(name).exists():
        here = f"{name} is no directory here and no model in the hub's cache, and the hub"
        if hub.HF_HUB_OFFLINE:
            return f"{here} is not asked: check the name, or unset HF_HUB_OFFLINE"
        return f"{here} cannot be reached: check the name and the network"
    if isinstance(error, (ValueError, ImportError)) and "trust_remote_code=" in str(error):
        return f"{name} needs its own Python code: give --trust-remote-code to run it"
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else type(error).__name__
    parts = (kind, first_sentence(error) or type(error).__name__, remedy(error))
    return ": ".join(part for part in (f"cannot load {name}", *parts) if part)


def remedy(error: Exception) -> str:
    """What to do about an error of transformers, where its first sentence does not say it."""
    text = " ".join(str(error).split())
    if wrong := misfit_behind(error):
        return wrong
    missing = re.search(r"pip install ([\w-]+)", text)
    missing = missing or re.search(r"requires the ([\w-]+) library", text)
    if missing and isinstance(error, (ValueError, ImportError)):
        name = missing[1].lower()
        if name in NEED_TORCHVISION and not has_torchvision():
            return install_torchvision()
        if name == "torchcodec":
            return decoding_fault() or install_torchcodec()
        return f"pip install {name}"
    if found := re.search(r"Can't load (image|video) processor", text):
        older = f"{'video_' if found[1] == 'video' else ''}preprocessor_config.json"
        return f"processor_config.json, or {older} of older models, must be beside it"
    return ""


def first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def check_device(device: str) -> None:
    """Raise InputError for a device that torch does not have here."""
    try:
        empty = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = first_sentence(error)
        if reason.startswith("Expected one of"):  # and 20 kinds of devices, most of them rare
            reason = "torch knows no such device"
        reason += ": give cpu, cuda, cuda:1 or mps, or leave --device out"
        raise InputError(f"--device {device} cannot be used here: {reason}") from error
    if empty.is_meta:
        raise InputError(f"--device {device} stores no numbers: give cpu, cuda or mps")


def _set_attention(model: Any, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn {attention}: {error}") from error


def pictures_alone(name: str, config: Any) -> bool:
    """Whether a model is read with its image processor only, so that it takes no videos.

    It is a local Qwen2-VL, and torchvision, which its processor needs, is missing.
    """
    return bool(config.model_type == "qwen2_vl" and Path(name).is_dir() and not has_torchvision())
