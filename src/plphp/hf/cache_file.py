"""The file of a saved conversation: safetensors whose metadata hold a JSON header, never pickle.

The header says the format's version and a checksum, CRC-32 over the header without it and over
every tensor's name, dtype, shape and bytes. A checksum finds damage; it is no signature.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plphp.errors import InputError

FORMAT = 2
READABLE = (1, FORMAT)  # 1 is plphp 0.1.0's: without a checksum, homes by their attributes' names
KEY = "plphp"  # of the metadata
LONGEST = 2**24  # characters of a header that is parsed at all


def write_file(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file that appears only when it is whole. Raises InputError where that fails.

    tensors: contiguous, on the CPU
    """
    whole = {"format": FORMAT, **header}
    whole["checksum"] = checksum(whole, tensors)
    target = Path(path)
    part = target.with_name(f".plphp-{uuid4().hex}.part")
    try:
        save_file(dict(tensors), part, metadata={KEY: json.dumps(whole)})
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str], most: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors, on the CPU. most: how many tensors there can be.

    What is allocated is bounded by the length of the file, whatever its header says. Raises
    InputError for what is no file of this kind, or of a format that this version cannot read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError("it is no regular file")
        with safe_open(path, framework="pt") as file:
            header = _header((file.metadata() or {}).get(KEY))
            names = list(file.keys())
            if len(names) > most:
                raise InputError(f"it has {len(names)} tensors, such a model's at most {most}")
            # Copies: a mapped file that somebody shortens later would end the process.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} is not a saved plphp cache: {error}") from error
    if type(header.get("format")) is not int or header["format"] not in READABLE:
        raise InputError(
            f"{path} is not a plphp cache of format {' or '.join(map(str, READABLE))}: it says "
            f"{short(header.get('format'))}"
        )
    return header, tensors


def check_whole(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError where a header's checksum is not that of what was read."""
    if header["format"] == 1:
        return
    try:
        found = checksum(header, tensors)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header is too deep: {error}") from error
    if header.get("checksum") != found:
        raise InputError("its checksum does not match: the file is damaged")


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of a header, its own checksum left out, and of tensors; 8 hexadecimal digits."""
    said = {name: value for name, value in header.items() if name != "checksum"}
    found = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        about = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        found = zlib.crc32(about.encode(), found)
        found = crc_of(tensor, found)
    return f"{found:08x}"


def crc_of(tensor: Tensor, before: int = 0) -> int:
    """CRC-32 of a tensor's bytes, on the CPU, after those that gave `before`."""
    if not tensor.numel():
        return before
    plain: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(plain, before)


def short(value: Any) -> str:
    """A value of a file for a message: as Python writes it, and not longer than a line."""
    try:
        said = repr(value)
    except RecursionError:
        said = "something deep"
    return said if len(said) <= 60 else f"{said[:57]}..."


def _header(text: Any) -> dict[str, Any]:
    if not isinstance(text, str) or len(text) > LONGEST:
        raise InputError("it has no header in plphp's format")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError("its header is no JSON object")
    return found
