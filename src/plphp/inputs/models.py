"""Models as a user names them, with what turns pictures and a question into their inputs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

from plphp.errors import InputError, PlphpError, UnsupportedModelError
from plphp.inputs.shell import check_depth

EMBEDDED = "embedded"

Prompt = tuple[Sequence[Image.Image], str]  # the pictures, then the question about them


class Runnable(Protocol):
    """A model with what turns pictures and a question into its inputs."""

    @property
    def model(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    def inputs(self, images: Sequence[Image.Image], question: str) -> dict[str, Tensor]: ...
    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]: ...
    def decode(self, ids: Tensor) -> str: ...


@dataclass(frozen=True)
class Loaded:
    """A model of the user's choice with its processor."""

    model: Any
    processor: Any

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def inputs(
        self, images: Sequence[Image.Image], question: str, videos: Sequence[Path] = ()
    ) -> dict[str, Tensor]:
        """What `model.generate(**inputs)` needs for one prompt."""
        return self.encode([_user(images, question, videos)])

    def batch(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Several prompts, padded on the left, as generate() wants them."""
        return self.encode_all([[_user(images, question)] for images, question in prompts])

    def encode_all(self, chats: Sequence[list[Any]], **options: Any) -> dict[str, Tensor]:
        """Several chats, each a list of messages as chat templates take them, padded on the left.

        options: the processor's
        """
        self.tokenizer.padding_side = "left"
        # Not every processor knows how to pad, and a single prompt needs none.
        if len(chats) == 1:
            return self.encode(chats[0], **options)
        return self.encode(list(chats), padding=True, **options)

    def encode(self, chats: list[Any], **options: Any) -> dict[str, Tensor]:
        """One chat, or several of one length. Raises ValueError for what the processor refuses."""
        encoded = self.processor.apply_chat_template(
            chats,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        made: Mapping[str, Any] = encoded.to(self.model.device, dtype=self.model.dtype)
        return dict(made)

    def decode(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def _user(
    images: Sequence[Image.Image], question: str, videos: Sequence[Path] = ()
) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "path": str(path)} for path in videos]
    return {"role": "user", "content": [*content, {"type": "text", "text": question}]}


def load(
    name: str, dtype: str, device: str, attention: str | None = None, trust: bool = False
) -> Runnable:
    """The embedded model, a local directory, or a hub id. Raises InputError with what to do.

    dtype: "auto" is what the weights have, or "float32", "bfloat16", "float16"
    device: a torch device, or "auto" to spread the layers over all of them; the embedded model,
        which is small, takes one of them
    """
    spread = device == "auto" and name != EMBEDDED
    if device == "auto":
        device = "cuda" if name == EMBEDDED and torch.cuda.is_available() else "cpu"
    check_device(device)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    kind: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    if name == EMBEDDED:
        from plphp.demo.model import load as load_embedded

        embedded = load_embedded(torch.float32 if kind == "auto" else kind, device)
        if attention:
            _set_attention(embedded.model, attention)
        return embedded
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config = load_config(name, trust)
    options: dict[str, Any] = {"dtype": kind, "trust_remote_code": trust}
    if attention:
        options["attn_implementation"] = attention
    if spread:
        options["device_map"] = "auto"
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust:
        raise UnsupportedModelError(
            f"{name} ({config.model_type}) is not a vision-language model that transformers knows"
        )
    with _reading(name):
        bare = _needs_no_processor(name, config)
        processor = None if bare else AutoProcessor.from_pretrained(name, trust_remote_code=trust)
        model = AutoModelForImageTextToText.from_pretrained(name, **options)
        model = (model if spread else model.to(device)).eval()
        return _embedded_like(model, name) if bare else Loaded(model, processor)


def _embedded_like(model: Any, name: str) -> Runnable:
    """A local Qwen2-VL with its pictures' half of the processor: the other needs torchvision."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    from plphp.demo.model import Embedded

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(name, local_files_only=True)
    return Embedded(model, tokenizer, pictures)


def is_embedded(loaded: Runnable) -> bool:
    """Whether this is the model that comes with the package, not one of its kind."""
    from plphp.demo.model import WEIGHTS

    return bool(loaded.model.name_or_path == str(WEIGHTS))


def load_config(name: str, trust: bool = False) -> Any:
    """The config of a model by name. Raises InputError for what is no model."""
    from transformers import AutoConfig, PreTrainedConfig

    if name == EMBEDDED:
        from plphp.demo.model import WEIGHTS

        name = str(WEIGHTS)
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"{name} is a directory without a config.json: not a model")
    if path.is_file():
        raise InputError(f"{name} is a file; --model takes a directory, a hub id, or 'embedded'")
    if name.startswith((".", "/", "~")) and not path.exists():
        raise InputError(f"{name}: no such directory")
    with _reading(name):
        check_depth(name, PreTrainedConfig.get_config_dict(name)[0])
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=trust)
        except (OSError, ValueError, ImportError, RecursionError):
            raise
        except Exception as error:  # of all kinds: each config class checks its own fields
            raise InputError(
                f"cannot load {name}: its config.json says what its model does not take "
                f"({_first_sentence(error)}); correct it"
            ) from error


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what transformers says about a model that cannot be read into one line."""
    try:
        yield
    except (PlphpError, MemoryError, torch.OutOfMemoryError):
        raise
    except RecursionError as error:
        raise InputError(
            f"cannot load {name}: its config.json is nested too deeply to be read; correct it"
        ) from error
    except Exception as error:
        raise InputError(_refusal(name, error)) from error


def _refusal(name: str, error: Exception) -> str:
    """What an error of transformers means for a model. Its name may hold any word: where the
    model is on this machine, the hub has nothing to do with it."""
    away = isinstance(error, OSError) and ("connect" in str(error) or "offline" in str(error))
    if away and not Path(name).exists():
        return (
            f"{name} is not on this machine and the model hub cannot be reached; give a local "
            "directory, or unset HF_HUB_OFFLINE and check the network"
        )
    if isinstance(error, (ValueError, ImportError)) and "trust_remote_code=" in str(error):
        return f"{name} comes with Python code of its own: --trust-remote-code runs it"
    kind = "" if isinstance(error, (OSError, ValueError, ImportError)) else type(error).__name__
    reason = ": ".join(part for part in (kind, _first_sentence(error)) if part)
    return f"cannot load {name}: {reason or type(error).__name__}"


def _first_sentence(error: Exception) -> str:
    return " ".join(str(error).split()).partition(". ")[0]


def check_device(device: str) -> None:
    """Raise InputError for a device that torch does not have here."""
    try:
        empty = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = _first_sentence(error)
        raise InputError(f"--device {device} cannot be used here: {reason}") from error
    if empty.is_meta:
        raise InputError(f"--device {device} holds no numbers: give cpu, cuda, mps, ...")


def _set_attention(model: Any, attention: str) -> None:
    try:
        model.set_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise InputError(f"--attn {attention}: {error}") from error


def _needs_no_processor(name: str, config: Any) -> bool:
    """A local Qwen2-VL without torchvision, which its processor needs and its pictures do not."""
    return bool(config.model_type == "qwen2_vl" and Path(name).is_dir() and not _has_torchvision())


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None
