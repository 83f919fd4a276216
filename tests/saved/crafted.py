"""Files that somebody wrote by hand, none of which may be believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Parts = tuple[dict[str, Any], dict[str, Tensor]]
Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def header(**values: Any) -> Change:
    return lambda header, _: header.update(values)


def layer(index: int = 0, **values: Any) -> Change:
    return lambda header, _: header["layers"][index].update(values)


def every_layer(**values: Any) -> Change:
    return lambda header, _: [layer.update(values) for layer in header["layers"]]


def without(name: str, index: int | None = None) -> Change:
    if index is None:
        return lambda header, _: header.pop(name)
    return lambda header, _: header["layers"][index].pop(name)


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return changed


def lost(name: str) -> Change:
    return lambda _, tensors: tensors.pop(name)


def put(name: str, value: Tensor) -> Change:
    return lambda _, tensors: tensors.update({name: value})


def with_number(at: tuple[int, ...], number: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[at] = number
        return x

    return change


IMAGE = {"row": 0, "image": 1, "tokens": 16, "kept": 0.5}
BAD_NUMBERS = ("8", 8.5, True, None, -1, 0, 10**18, 10**400, float("nan"), [8], {})

PLAIN: dict[str, Change] = {
    **{f"format {value!r:.20}": header(format=value) for value in (0, 3, "1", True, None, 1.5, [])},
    **{f"recall {value!r}": header(recall=value) for value in ([1], "host", {"home": []}, 7, True)},
    **{f"layers {value!r}": header(layers=value) for value in (None, {}, "abcd", 4, [1, 2, 3, 4])},
    **{f"layers {value!r}": header(layers=[value] * 4) for value in (None, [], {})},
    **{f"end {value!r:.20}": layer(end=value) for value in BAD_NUMBERS},
    **{f"logical {value!r:.20}": layer(logical=value) for value in BAD_NUMBERS},
    **{f"logical of all {value!r:.20}": every_layer(logical=value) for value in BAD_NUMBERS[:-4]},
    **{f"raw {value!r}": layer(raw=value) for value in ("no", 1, None, True)},
    **{f"parked {value!r}": layer(parked=value) for value in ({}, [], "x", {"begin": 0})},
    **{f"window {value!r:.20}": layer(window=value) for value in (7, "x", [])},
    **{
        f"last_image {value!r:.20}": header(last_image=value) for value in BAD_NUMBERS if value != 0
    },
    **{
        f"images {value!r}": header(images=value) for value in (None, 7, {}, "x", [1], [{}], [None])
    },
    "an image of no row": header(images=[{**IMAGE, "row": 9}]),
    "an image that is more than kept": header(images=[{**IMAGE, "kept": 1.5}]),
    "an image that is kept beyond all floats": header(images=[{**IMAGE, "kept": 10**400}]),
    "an image that is kept NaN": header(images=[{**IMAGE, "kept": float("nan")}]),
    "an image of minus one token": header(images=[{**IMAGE, "tokens": -1}]),
    "an image with more to say": header(images=[{**IMAGE, "path": "x"}]),
    **{f"no {name}": without(name) for name in ("format", "model_type", "layers", "images")},
    "no last image": without("last_image"),
    "no raw": without("raw", 2),
    "no end": without("end", 2),
    "lengths that differ": layer(3, logical=33),
    "whole numbers as keys": tensor("0.keys", lambda x: x.long()),
    "half precision in one layer": lambda _, tensors: tensors.update(
        {name: tensors[name].half() for name in ("2.keys", "2.values")}
    ),
    "half precision in all": lambda _, tensors: tensors.update(
        {name: x.half() for name, x in tensors.items() if x.is_floating_point()}
    ),
    "keys of fewer numbers": tensor("1.keys", lambda x: x[..., :4]),
    "values of fewer numbers": tensor("1.values", lambda x: x[..., :4]),
    "values of fewer tokens": tensor("1.values", lambda x: x[:, :, 1:]),
    "another KV head": lambda _, tensors: tensors.update(
        {name: torch.cat([tensors[name]] * 2, 1) for name in ("1.keys", "1.values")}
    ),
    "two rows in one layer": lambda _, tensors: tensors.update(
        {name: torch.cat([tensors[name]] * 2) for name in ("1.keys", "1.values", "1.start")}
    ),
    "no rows": lambda _, tensors: tensors.update({name: x[:0] for name, x in tensors.items()}),
    "starts that are fractions": tensor("1.start", lambda x: x + 0.5),
    "starts of another size": tensor("1.start", lambda x: x.int()),
    "a start before the first slot": tensor("1.start", lambda x: x - 1),
    "a start for every slot": tensor("1.start", lambda x: x[:, None]),
    "no shift": lost("shift"),
    "shift of another shape": tensor("shift", lambda x: x[:, None]),
    "shift for more rows": tensor("shift", lambda x: torch.cat([x, x])),
    "a shift that is no whole number": tensor("shift", lambda x: x + 0.5),
    "a shift that is far away": tensor("shift", lambda x: x + 2**40),
    "spans without recall": put("spans", torch.zeros(1, 4).long()),
    "a layer too many": put("4.keys", torch.zeros(1, 1, 4, 8)),
    "parked without recall": put("0.parked.keys", torch.zeros(1, 1, 4, 8)),
}
WINDOW: dict[str, Change] = {
    "no positions": lost("1.positions"),
    "positions of another kind": tensor("1.positions", lambda x: x.float()),
    "positions beyond the conversation": tensor("1.positions", lambda x: x + 999),
    "positions before it": tensor("1.positions", lambda x: x - 999),
    "positions out of order": tensor("1.positions", lambda x: x.flip(-1)),
    "positions of fewer slots": tensor("1.positions", lambda x: x[..., 1:]),
    "another window": every_layer(window=20),
}
PARKS: dict[str, Change] = {
    "nothing parked": layer(parked=None),
    "parked in another form": layer(parked=[]),
    "no spans": lost("spans"),
    "spans that are fractions": tensor("spans", lambda x: x + 0.5),
    "spans of more rows": tensor("spans", lambda x: torch.cat([x, x])),
    "an image too many": tensor("spans", lambda x: x * 10**6),
    "no image": tensor("spans", torch.zeros_like),
    "a text token that is an image's": tensor("spans", with_number((0, -1), 1)),
    "spans of fewer columns": tensor("spans", lambda x: x[:, :5]),
    "spans that begin with padding": tensor("spans", lambda x: torch.where(x > 0, x, -1)),
    "nothing at hand": tensor("1.parked.held", lambda x: x[..., :0]),
    "the same token twice": tensor("1.parked.held", lambda x: x[..., :1].expand_as(x)),
    "a token that is not there": tensor("1.parked.held", lambda x: x + 999),
    "a token before the first": tensor("1.parked.held", with_number((0, 0, 0), -1)),
    "fractions at hand": tensor("1.parked.held", lambda x: x.float()),
    "at hand in another shape": tensor("1.parked.held", lambda x: x[0]),
    "one token less at hand": tensor("1.parked.held", lambda x: x[..., :-1]),
    "parked in another layer": lambda _, tensors: tensors.update(
        {name.replace("1.", "7."): tensors.pop(name) for name in list(tensors) if "1.par" in name}
    ),
    "more than parked": put("1.parked.more", torch.zeros(1)),
}
HOST: dict[str, Change] = {
    **PARKS,
    **{
        f"begin {value!r:.20}": layer(1, parked={"begin": value})
        for value in BAD_NUMBERS
        if value != 0
    },
    "no begin": layer(1, parked={}),
    "parked keys of fewer tokens": tensor("1.parked.keys", lambda x: x[:, :, 1:]),
    "parked values of fewer numbers": tensor("1.parked.values", lambda x: x[..., :4]),
    "parked in half precision": tensor("1.parked.keys", lambda x: x.half()),
    "an index of more directions": tensor("1.parked.index.basis", lambda x: x.repeat(1, 1, 2, 1)),
    "an index of fewer tokens": tensor("1.parked.index.codes", lambda x: x[..., 2:]),
    "an index of other numbers": tensor("1.parked.index.codes", lambda x: x.int()),
    "no index": lost("1.parked.index.codes"),
}
INT4: dict[str, Change] = {
    **PARKS,
    "codes of fewer keys": tensor("1.parked.keys.codes", lambda x: x[..., 4:]),
    "codes of fewer values": tensor("1.parked.values.codes", lambda x: x[:, :, 1:]),
    "codes in another shape": tensor("1.parked.values.codes", lambda x: x[..., :-2]),
    "codes of other numbers": tensor("1.parked.keys.codes", lambda x: x.short()),
    "no codes": lost("1.parked.values.codes"),
}
CRAFTED: dict[str, dict[str, Change]] = {
    "plain": PLAIN,
    "plain_window": WINDOW,
    "host_record": HOST,
    "host_batch": PARKS,
    "host_window": {**PARKS, **WINDOW},
    "int4_batch": INT4,
    "int4_window": {**PARKS, **WINDOW},
}
