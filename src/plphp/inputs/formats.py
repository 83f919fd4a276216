"""The number format in which a model is loaded, for commands that load no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from plphp.inputs.models import EMBEDDED

ASSUMED = torch.bfloat16  # in which most models are published
FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


def number_format(name: str, config: Any, dtype: str) -> tuple[torch.dtype, str]:
    """The dtype in which `plphp.inputs.load` loads a model, and a note if it is assumed.

    name, dtype: as in `load`; config: what `load_config` returns for the name

    As in transformers, "auto" is what the config of the whole model says, or else what the weights
    have, if they are on this machine. Else it is what the language model's config says, or ASSUMED.
    """
    if dtype != "auto":
        return getattr(torch, dtype), ""
    if name == EMBEDDED:
        return torch.float32, ""
    text = getattr(config.get_text_config(decoder=True), "dtype", None)
    for found in (getattr(config, "dtype", None), _of_weights(Path(name)), text):
        if isinstance(found, torch.dtype):
            return found, ""
    word = str(ASSUMED).removeprefix("torch.")
    return ASSUMED, f"the number format of the weights is unknown: {word} is assumed; give --dtype"


def _of_weights(folder: Path) -> torch.dtype | None:
    """The dtype of the first weight in the safetensors files of a directory that is a float."""
    from safetensors import SafetensorError, safe_open

    try:
        for path in sorted(folder.glob("model*.safetensors")):
            with safe_open(path, "pt") as file:
                names = file.keys()
                kinds = (FORMATS.get(file.get_slice(name).get_dtype()) for name in names)
                if kind := next(filter(None, kinds), None):
                    return kind
    except (OSError, SafetensorError):  # `load` refuses such a file
        pass
    return None
