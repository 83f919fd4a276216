"""Ways to damage a saved conversation, drawn by hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from plphp.hf.cache_file import KEY, checksum

DEEP = {f"DEEP{depth}": "[" * depth + "]" * depth for depth in (90, 900, 970, 5000)}
VALUES = st.one_of(
    st.sampled_from([None, True, False, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0"]),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.sampled_from(["host", "\ud800", "x" * 1000, [], [1], {}, {"keys": 1}, [[[]]]]),
    st.just({"row": 0, "image": 1, "tokens": 1, "kept": 2}),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32)
DTYPES += (torch.int16, torch.uint8, torch.bool, torch.float8_e4m3fn)


@dataclass
class Damaged:
    """A file. how: in words; data: whether what it says was only replaced by other data.

    Other data under a checksum of its own cannot be told from another conversation.
    """

    file: bytes = field(repr=False)
    how: str
    data: bool = False


def parts(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()[KEY])
        return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def packed(header: dict[str, Any], tensors: dict[str, Tensor], sealed: bool) -> bytes:
    """A file of these. sealed: with a checksum of its own."""
    if sealed and header.get("format") == 2:
        header = {**header, "checksum": checksum(header, tensors)}
    text = json.dumps(header)
    for name, deep in DEEP.items():
        text = text.replace(f'"{name}"', deep)
    return save(tensors, metadata={KEY: text})


@st.composite
def damaged_bytes(draw: Any, whole: bytes) -> Damaged:
    """Bytes flipped, cut out, doubled, put in, or cut off."""
    place = st.integers(0, len(whole) - 1)
    if draw(st.booleans()):  # where lengths and names are
        place = st.integers(0, min(len(whole) - 1, 8 + int.from_bytes(whole[:8], "little")))
    at, length = draw(place), draw(st.integers(1, 64))
    kind = draw(st.sampled_from(["flip", "set", "cut", "double", "insert", "end", "more"]))
    other = draw(st.binary(min_size=1, max_size=16))
    after = {
        "flip": whole[:at] + bytes([whole[at] ^ (1 << length % 8)]) + whole[at + 1 :],
        "set": whole[:at] + other + whole[at + len(other) :],
        "cut": whole[:at] + whole[at + length :],
        "double": whole[: at + length] + whole[at:],
        "insert": whole[:at] + other + whole[at:],
        "end": whole[:at],
        "more": whole + other,
    }[kind]
    return Damaged(after, f"bytes: {kind} at {at}")


def walk(owner: Any, before: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place of a JSON value: what holds it, under which key, and the path in words."""
    items = owner.items() if isinstance(owner, dict) else enumerate(owner)
    for key, value in items:
        yield owner, key, f"{before}/{key}"
        if isinstance(value, dict | list):
            yield from walk(value, f"{before}/{key}")


@st.composite
def damaged_header(draw: Any, header: dict[str, Any], tensors: dict[str, Tensor]) -> Damaged:
    """One or two values of the header replaced, removed, added, moved a little or made deep."""
    header, sealed = copy.deepcopy(header), draw(st.booleans())
    how, data = [], False
    for _ in range(draw(st.integers(1, 2))):
        places = list(walk(header))
        if not places:
            break
        owner, key, path = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["set", "remove", "add", "near", "deep"]))
        value = copy.deepcopy(draw(VALUES))
        if kind == "remove":
            del owner[key]
        elif kind == "add" and isinstance(owner, dict):
            owner[draw(st.sampled_from(["x", "keys", "logical", "home", "begin"]))] = value
        elif kind == "near" and isinstance(owner[key], int) and not isinstance(owner[key], bool):
            owner[key] += draw(st.sampled_from([-1, 1, 2**32]))
        else:
            owner[key] = draw(st.sampled_from(sorted(DEEP))) if kind == "deep" else value
        how.append(f"{path} {kind} {str(value)[:20]}")
        data = data or (sealed and key == "begin")  # when a choice is due can be any column
    return Damaged(packed(header, tensors, sealed), f"header, sealed {sealed}: {how}", data)


@st.composite
def damaged_tensors(draw: Any, header: dict[str, Any], tensors: dict[str, Tensor]) -> Damaged:
    """One tensor lost, renamed, swapped, of another dtype, shape or size, or with other numbers."""
    tensors, sealed = dict(tensors), draw(st.booleans())
    names = sorted(tensors)
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    kind = draw(st.sampled_from(["lose", "rename", "swap", "dtype", "shape", "size", "set", "add"]))
    one, data = tensors[name], kind in ("swap", "set")
    if kind == "lose":
        del tensors[name]
    elif kind == "rename":
        tensors[draw(st.sampled_from(["x", "9.keys", "0.parked.x", name + "x"]))] = tensors.pop(
            name
        )
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other].clone(), one.clone()
    elif kind == "dtype":
        tensors[name] = one.to(draw(st.sampled_from(DTYPES)))
    elif kind == "shape":
        shapes = [(-1,), (1, *one.shape), tuple(reversed(one.shape)), (*one.shape, 1)]
        tensors[name] = one.reshape(draw(st.sampled_from(shapes)))
    elif kind == "size":
        dim = draw(st.integers(0, one.dim() - 1))
        parts = [one[(slice(None),) * dim + (slice(-1),)], torch.cat([one, one], dim)]
        tensors[name] = draw(st.sampled_from([*parts, one[:0]])).contiguous()
    elif kind == "add":
        tensors[draw(st.sampled_from(["x", "0.parked.columns", "9.keys", "spans"]))] = one.clone()
    elif one.numel():
        tensors[name] = one = one.clone()
        at = draw(st.integers(0, one.numel() - 1))
        most = 255 if one.dtype == torch.uint8 else 32767
        number = draw(st.sampled_from([-1, 0, 1, 2, 40, 127, most, -32768, 2**31 - 1, 2**62]))
        small = number if one.dtype == torch.int64 else max(min(number, most), -32768)
        one.view(-1)[at] = small % 256 if one.dtype == torch.uint8 else small
    how = f"tensor, sealed {sealed}: {kind} {name} {other}"
    return Damaged(packed(header, tensors, sealed), how, data and sealed)


def damaged(file: Path) -> st.SearchStrategy[Damaged]:
    """Any of these of a file."""
    header, tensors = parts(file)
    return st.one_of(
        damaged_bytes(file.read_bytes()),
        damaged_header(header, tensors),
        damaged_tensors(header, tensors),
    )
