"""`plphp env`: the versions and devices that a bug report needs."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import platform
from typing import Any

from plphp._installed import notes
from plphp._version import __version__
from plphp.cli.options import Json

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "triton",
    "vllm",
    "torchvision",
    "torchcodec",
    "pillow",
)


def env(as_json: Json = False) -> None:
    """Print the versions and devices that a bug report needs."""
    found = describe()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    remarks = found.pop("notes")
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")
    for note in remarks:
        print(f"note: {note}")


def describe() -> dict[str, Any]:
    """Name -> value, in the order in which the command prints them."""
    import torch

    found: dict[str, Any] = {
        "plphp": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
    }
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["cuda"] = torch.version.cuda
    found["devices"] = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]
    found["notes"] = [*notes()]
    return found
