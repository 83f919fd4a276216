"""The file of a saved conversation: safetensors with a JSON header in its metadata.

The header has the version of the format and a checksum: CRC-32 of the header without the checksum
and of the name, dtype, shape and bytes of every tensor. It detects damage. It is no signature.
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
# Format 1 is that of plphp 0.1.0. It has no checksum, and names the attributes of homes.
READABLE = (1, FORMAT)
KEY = "plphp"  # key of the header in the metadata
MAX_HEADER = 2**24  # characters; a longer header is not parsed


def write_file(
    path: str | os.PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write a file. It appears under its name only when it is complete.

    header: without the format and the checksum
    tensors: contiguous, on the CPU
    Raises InputError if the file cannot be written.
    """
    complete = {"format": FORMAT, **header}
    complete["checksum"] = checksum(complete, tensors)
    target = Path(path)
    if not target.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no directory {target.parent}")
    part = target.with_name(f".plphp-{uuid4().hex}.part")
    try:
        save_file(dict(tensors), part, metadata={KEY: json.dumps(complete)})
        os.replace(part, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str], most: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the header and the tensors of a file, onto the CPU.

    most: the largest number of tensors that the file may have

    The memory allocated is bounded by the length of the file, whatever its header says. Raises
    InputError if it is no such file, or has a format that this version cannot read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError("this is no regular file")
        with safe_open(path, framework="pt") as file:
            header = _header((file.metadata() or {}).get(KEY))
            names = list(file.keys())
            if len(names) > most:
                raise InputError(
                    f"the file has {len(names)} tensors, and a cache of this model at most {most}"
                )
            # Copies: the process would crash if a file that is mapped were shortened later.
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} is not a saved plphp cache: {error}") from error
    if type(header.get("format")) is not int or header["format"] not in READABLE:
        raise InputError(
            f"{path} is not a plphp cache of format {' or '.join(map(str, READABLE))}: the format "
            f"in its header is {short(header.get('format'))}"
        )
    return header, tensors


def check_whole(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise InputError if the checksum in the header is not that of the content."""
    if header["format"] == 1:
        return
    try:
        expected = checksum(header, tensors)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is nested too deeply: {error}") from error
    if header.get("checksum") != expected:
        raise InputError("the file is damaged: its checksum does not match its content")


def checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of a header without its checksum, and of tensors, as 8 hexadecimal digits."""
    content = {name: value for name, value in header.items() if name != "checksum"}
    crc = zlib.crc32(json.dumps(content, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        description = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        crc = zlib.crc32(description.encode(), crc)
        crc = crc_of(tensor, crc)
    return f"{crc:08x}"


def crc_of(tensor: Tensor, before: int = 0) -> int:
    """CRC-32 of the bytes of a tensor on the CPU, continued from the CRC-32 `before`."""
    if not tensor.numel():
        return before
    content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(content, before)


def short(value: Any) -> str:
    """The repr of a value, for a message, cut to 60 characters."""
    try:
        text = repr(value)
    except RecursionError:
        text = "a value nested too deeply"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _header(text: Any) -> dict[str, Any]:
    """Parse a header. Raises InputError."""
    if not isinstance(text, str) or len(text) > MAX_HEADER:
        raise InputError("the file has no header in plphp's format")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise InputError("the header is not a JSON object")
    return header
