"""Digests of what a run was asked to do, so that another request cannot continue its work."""

from __future__ import annotations

import hashlib
import os
import stat
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from plphp._version import __version__
from plphp.inputs import EMBEDDED, lines


def digest(value: Any) -> str:
    """A digest of 16 characters: JSON values that differ have different digests."""
    return hashlib.sha256(lines.dump(value, allow_nan=True).encode("utf-8")).hexdigest()[:16]


def file_digest(path: str) -> str:
    """A digest of the bytes of a file, or its name and the reason why it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return f"{path}: no file"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        return f"{path}: {type(error).__name__}"


def model_identity(name: str) -> list[Any]:
    """What identifies a model: its name, versions, and the names, sizes and times of its files.

    Of the embedded model it is the weights' digest, since installing a package sets new times.
    """
    versions = [name, __version__, version("transformers"), version("torch")]
    if name == EMBEDDED:
        return [*versions, file_digest(str(files("plphp.demo") / "weights" / "model.safetensors"))]
    folder = Path(name)
    if not folder.is_dir():
        return versions
    found = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [*versions, [[file, s.st_size, s.st_mtime_ns] for file, s in found]]
